"""The drawings that train the mini, by nine hands: openly licensed emoji from npm, and clip art from Debian.

A subject is drawn by several hands, so that a word stands for more than one picture. The emoji come as npm
packages; `reifusion/data/emoji_names.tsv.gz` says which drawing of each shows which emoji. The clip art comes
as a Debian package, and `reifusion/data/clipart.tsv.gz` says what they show, in words written by hand.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..images import DataError


@dataclass(frozen=True)
class Hand:
    """Drawings by one hand."""

    look: str  # the captions' word for them
    package: str  # package@version, or package=version
    sha256: str  # of the package's archive
    licence: str
    creator: str


HANDS = {
    "fluent-emoji-3d": Hand("3d", "@lobehub/fluent-emoji-3d@1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT", "Microsoft Corporation"),  # noqa: E501
    "fluent-emoji-flat": Hand("flat", "@iconify-json/fluent-emoji-flat@1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175", "MIT", "Microsoft Corporation"),  # noqa: E501
    "noto": Hand("cartoon", "@iconify-json/noto@1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0", "Google Inc"),  # noqa: E501
    "noto-v1": Hand("flat", "@iconify-json/noto-v1@1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37", "Apache-2.0", "Google Inc"),  # noqa: E501
    "twemoji": Hand("flat", "@iconify-json/twemoji@1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7", "CC-BY-4.0", "Twitter, Inc and other contributors"),  # noqa: E501
    "emojione": Hand("flat", "@iconify-json/emojione@1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e", "CC-BY-4.0", "Emoji One"),  # noqa: E501
    "fxemoji": Hand("flat", "@iconify-json/fxemoji@1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef", "CC-BY-4.0", "Mozilla Foundation"),  # noqa: E501
    "streamline-emojis": Hand("outlined", "@iconify-json/streamline-emojis@1.2.4", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc", "CC-BY-4.0", "Streamline"),  # noqa: E501
    "openclipart": Hand("clip art", "openclipart-svg=1:0.18+dfsg-19", "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5", "public domain", "Open Clip Art"),  # noqa: E501
}  # fmt: skip
# What the emoji are called: not a hand, but fetched like one.
EMOJIBASE = Hand("", "emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "MIT", "Miles Johnson")  # noqa: E501  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One drawing as it was published."""

    hand: str
    picture: bytes  # SVG or WebP
    code: str = ""  # the emoji's
    # Of clip art:
    subject: str = ""
    caption: str = ""  # what this very drawing shows: "grey lizard"
    creator: str = ""


# ---- packages ---------------------------------------------------------------------------------------------


def archive_path(hand: Hand, cache: Path) -> Path:
    """Returns where the package is kept."""
    name = hand.package.strip("@").replace("/", "-").replace(":", "-")
    return cache / "packages" / (name + (".deb" if "=" in hand.package else ".tgz"))


def fetch(hand: Hand, cache: Path) -> Path:
    """Downloads the package if it is missing, checked against its SHA-256; returns its archive."""
    archive = archive_path(hand, cache)
    if archive.exists():
        return archive
    command = ["apt-get", "download"] if archive.suffix == ".deb" else ["npm", "pack", "--silent"]
    program = shutil.which(command[0])
    if program is None:
        raise DataError(f"{hand.package} is fetched with {command[0]}, and that command was not found")
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        run = [program, *command[1:], hand.package]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob(f"*{archive.suffix}"))
        if done.returncode != 0 or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{command[0]} could not fetch {hand.package}: {reason}")
        if hashlib.sha256(found[0].read_bytes()).hexdigest() != hand.sha256:
            raise DataError(
                f"{command[0]} fetched other bytes for {hand.package} than this recipe was made with"
            )
        os.replace(found[0], archive)
    return archive


def read_package(archive: Path) -> dict[str, bytes]:
    """Reads the files of a package in memory, so that none can escape to another folder."""
    packed = (
        _debian_data(archive.read_bytes())
        if archive.suffix == ".deb"
        else gzip.decompress(archive.read_bytes())
    )
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return {
            member.name.removeprefix("package/").removeprefix("./"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar
            if member.isfile()
        }


def _debian_data(archive: bytes) -> bytes:
    """Returns the tar file in a Debian package, an `ar` archive: headers of 60 bytes, and members."""
    at = len(b"!<arch>\n")
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip(" /"), int(archive[at + 48 : at + 58])
        if name == "data.tar.xz":
            return lzma.decompress(archive[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise DataError("a Debian package without data.tar.xz")


# ---- drawings ---------------------------------------------------------------------------------------------


def read_table(name: str) -> list[dict[str, str]]:
    """Reads one of this package's tables, whose first line names the columns."""
    text = gzip.decompress((files("reifusion") / "data" / name).read_bytes()).decode()
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def read_hand(name: str, cache: Path) -> Iterator[Drawing]:
    """Yields the drawings of one hand, fetching its package if need be. Raises DataError if that fails."""
    package = read_package(fetch(HANDS[name], cache))
    if name == "openclipart":
        for row in read_table("clipart.tsv.gz"):
            svg = package[f"usr/share/openclipart/svg/{row['path']}"]
            yield Drawing(name, svg, "", row["subject"], row["caption"], row["creator"])
        return
    icons = json.loads(package.get("icons.json", b"{}"))
    for row in read_table("emoji_names.tsv.gz"):
        code = row["code"]
        if not icons:  # pictures, by the emoji's code
            picture = next(filter(None, (package.get(f"assets/{c}.webp") for c in spellings(code))), None)
        else:
            picture = _svg(icons, row[name]).encode() if row[name] else None
        if picture:
            yield Drawing(name, picture, code)


def spellings(code: str) -> tuple[str, ...]:
    """Returns the ways to write an emoji's code: the packages disagree on the variation selector fe0f."""
    return code, code.replace("-fe0f", ""), f"{code}-fe0f"


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
