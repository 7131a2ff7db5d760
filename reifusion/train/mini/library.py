"""The mini's sprites: the drawings of all hands, rendered once at 256 × 256, and what is known of each.

`read_library()` returns them. The first call fetches the packages and renders the drawings, which takes some
minutes; the result is one file, which can be carried to another machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...bar import Bar
from ...files import whole
from ..images import DataError
from .colours import COLOURS, stands_out
from .hands import EMOJIBASE, HANDS, Drawing, fetch, read_hand, read_package, read_table
from .subjects import CHOSEN, COLOUR_WORDS, NO_DYE, NO_MIRROR, ODD_LABELS, parse_choice

SIDE, BOX = 256, 224  # in pixels: a sprite, and the square inside it that the subject fills


@dataclass(frozen=True)
class Sprite:
    """What is known of one sprite."""

    subject: str  # "car"
    look: str = ""  # "flat"
    hand: str = ""  # "twemoji"
    category: str = ""  # the Unicode subgroup, "transport-ground", or "clip art"
    synonyms: tuple[str, ...] = ()  # other names for captions: ("automobile",)
    keywords: tuple[str, ...] = ()  # loosely related words, which captions never use
    caption: str = ""  # what this very drawing shows, if more than its subject: "grey lizard"
    licence: str = ""
    creator: str = ""
    dyeable: bool = True  # False if its names include a colour, or it shows people or hands
    mirrors: bool = True  # False if a mirrored one would be wrong
    stands_out: tuple[str, ...] = ()  # colours of backgrounds on which it can be seen
    foot: int = SIDE  # the row below its lowest pixel


@dataclass
class Library:
    """The sprites, and where to find those of a subject."""

    sprites: list[Sprite]
    pixels: Tensor  # (N, 4, SIDE, SIDE) uint8; empty if only the records were read

    def __post_init__(self) -> None:
        self.of: dict[str, list[int]] = {}  # subject -> its sprites
        for i, sprite in enumerate(self.sprites):
            self.of.setdefault(sprite.subject, []).append(i)
        self.subjects = list(self.of)


def default_cache() -> Path:
    """Returns ~/.cache/reifusion/mini, or `mini` inside $REIFUSION_CACHE."""
    return Path(os.environ.get("REIFUSION_CACHE", "~/.cache/reifusion")).expanduser() / "mini"


# ---- names ------------------------------------------------------------------------------------------------


def choose(emojibase: list[dict[str, Any]], subgroups: dict[str, str]) -> Iterator[tuple[str, Sprite]]:
    """Emojibase's list -> (code, a record without a drawing) for every emoji that becomes a subject."""
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
        coloured = bool(COLOUR_WORDS & set(own.split()))
        if own not in names and own not in ODD_LABELS and own.isascii() and not coloured:
            names.append(own)
        if category.startswith("face-") and names[0].endswith(" face"):
            names.append(names[0].removesuffix("face") + "smiley")
        keywords = tuple(emoji.get("tags", ()))
        yield emoji["hexcode"].lower(), _record(names[0], category, tuple(names[1:]), keywords)


def _record(
    subject: str, category: str, synonyms: tuple[str, ...] = (), keywords: tuple[str, ...] = ()
) -> Sprite:
    words = set(" ".join((subject, *synonyms)).split())
    dyeable = not (subject in NO_DYE or COLOUR_WORDS & words or category.startswith(("person", "hand")))
    mirrors = subject not in NO_MIRROR
    return Sprite(
        subject, category=category, synonyms=synonyms, keywords=keywords, dyeable=dyeable, mirrors=mirrors
    )


def describe(drawing: Drawing, emoji: dict[str, Sprite], named: dict[str, Sprite]) -> Sprite:
    """Returns the record of a drawing. emoji: by code. named: by subject, for clip art of the same things."""
    hand = HANDS[drawing.hand]
    common: dict[str, Any] = {"look": hand.look, "hand": drawing.hand, "licence": hand.licence}
    if drawing.code:
        return replace(emoji[drawing.code], creator=hand.creator, **common)
    record = named.get(drawing.subject) or _record(drawing.subject, "clip art")
    return replace(record, caption=drawing.caption, creator=drawing.creator, **common)


# ---- pictures ---------------------------------------------------------------------------------------------


def render(picture: bytes, width: int) -> Image.Image:
    """SVG or WebP -> an image with transparency; an SVG becomes `width` pixels wide."""
    if picture.startswith(b"RIFF"):
        return Image.open(io.BytesIO(picture))
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing the training pictures needs the package resvg-py") from error
    # Lengths in millimetres or points need dpi.
    png = resvg_py.svg_to_bytes(svg_string=picture.decode(), width=width, dpi=96, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def to_sprite(image: Image.Image) -> Image.Image:
    """A drawing with transparency -> SIDE × SIDE pixels, with the subject filling the box in the middle."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()  # faint shadows don't count
    if box is None:
        raise DataError("a drawing is empty")
    image = image.crop(box)
    scale = BOX / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    # Pillow premultiplies RGBA when it resizes, so soft edges get no dark rim.
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (SIDE, SIDE))
    sprite.paste(image, ((SIDE - width) // 2, (SIDE - height) // 2))
    return sprite


def _finish(job: tuple[Drawing, Sprite]) -> tuple[Sprite, bytes]:
    drawing, record = job
    # Emoji fill their page; clip art may lie in a corner of it.
    sprite = to_sprite(render(drawing.picture, SIDE if drawing.code else 2 * SIDE))
    pixels = torch.from_numpy(np.array(sprite)).permute(2, 0, 1) / 255
    rows = (pixels[3] > 0.25).any(1).nonzero()
    return replace(record, stands_out=stands_out(pixels), foot=int(rows[-1]) + 1), to_webp(sprite)


def to_webp(sprite: Image.Image) -> bytes:
    file = io.BytesIO()
    sprite.save(file, "WEBP", quality=92, method=2)
    return file.getvalue()


# ---- the file ---------------------------------------------------------------------------------------------


def library_path(cache: Path, hands: tuple[str, ...] = tuple(HANDS)) -> Path:
    """Returns the file of the rendered sprites; its name has a hash of the choices that decide them."""
    packages = [HANDS[name].sha256 for name in hands]
    tables = [read_table("emoji_names.tsv.gz"), read_table("clipart.tsv.gz")]
    rules = [sorted(rule) for rule in (ODD_LABELS, COLOUR_WORDS, NO_DYE, NO_MIRROR)]
    choices = json.dumps([packages, EMOJIBASE.sha256, tables, CHOSEN, rules, COLOURS, SIDE, BOX])
    return cache / f"sprites-{hashlib.sha256(choices.encode()).hexdigest()[:8]}.zip"


def build_library(cache: Path) -> Path:
    """Fetches, names and renders the drawings, once; returns the file with the sprites and their records.

    Without Debian's tools the clip art is left out, with a warning: 951 of the drawings, 182 of the subjects.
    """
    path = library_path(cache)
    if path.exists():
        return path
    base = read_package(fetch(EMOJIBASE, cache))
    subgroups = json.loads(base["meta/groups.json"])["subgroups"]
    emoji = dict(choose(json.loads(base["en/data.json"]), subgroups))
    named = {record.subject: record for record in emoji.values()}
    drawings: list[Drawing] = []
    for name in HANDS:
        try:
            drawings += read_hand(name, cache)
        except DataError as error:
            if name != "openclipart":
                raise
            lost = "951 of its 5,728 drawings, and the only ones of 182 of its 934 subjects"
            warnings.warn(f"{error}; the mini learns without clip art: {lost}", stacklevel=2)
            path = library_path(cache, tuple(hand for hand in HANDS if hand != name))
            if path.exists():
                return path
    jobs = [(drawing, describe(drawing, emoji, named)) for drawing in drawings]
    # New processes, as a forked one may wait for ever for the threads of PyTorch that it did not inherit.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context) if len(jobs) > 100 else ThreadPoolExecutor(1) as pool:
        work = pool.map(_finish, jobs, chunksize=16)
        done = list(Bar(work, desc="drawing", unit="sprite", total=len(jobs)))
    write_library(done, path)
    return path


def write_library(sprites: Sequence[tuple[Sprite, bytes]], path: Path) -> None:
    """Writes records and pictures (WebP) into one file."""
    with whole(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        file.writestr("sprites.json", json.dumps([asdict(record) for record, _ in sprites]))
        for i, (_, picture) in enumerate(sprites):
            file.writestr(f"{i:05}.webp", picture)


def read_library(path: Path | None = None, pixels: bool = True) -> Library:
    """Reads the sprites, after building their file if there is none. Raises DataError if that fails."""
    with zipfile.ZipFile(path or build_library(default_cache())) as file:
        records = [_from_json(record) for record in json.loads(file.read("sprites.json"))]
        names = sorted(name for name in file.namelist() if name.endswith(".webp")) if pixels else []
        pictures = [file.read(name) for name in names]
    out = torch.empty(len(pictures), 4, SIDE, SIDE, dtype=torch.uint8)

    def decode(i: int) -> None:
        with Image.open(io.BytesIO(pictures[i])) as image:
            out[i] = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(pictures))))
    return Library(records, out)


def _from_json(record: dict[str, Any]) -> Sprite:
    return Sprite(**(record | {key: tuple(x) for key, x in record.items() if isinstance(x, list)}))
