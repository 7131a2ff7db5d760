"""Subjects, packages and sprites. No network is needed: drawings are made up, npm and apt-get are scripts."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion.train.images import DataError
from reifusion.train.mini import hands, library
from reifusion.train.mini.hands import EMOJIBASE, HANDS, Drawing, fetch, read_package, read_table
from reifusion.train.mini.held_out import held_out_colour, held_out_look, held_out_place, held_out_style
from reifusion.train.mini.library import Sprite, build_library, describe, read_library, to_sprite
from reifusion.train.mini.subjects import CHOSEN, noun_phrase, parse_choice
from tests.sprites import NOUNS, prepared_library

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{}</svg>'
SQUARE = '<path fill="#c80000" d="M2 4h12v8H2z"/>'


# ---- names


@pytest.mark.parametrize(
    "noun, adjective, phrase",
    [("cat", "", "a cat"), ("owl", "", "an owl"), ("owl", "blue", "a blue owl"), ("ufo", "", "a ufo"),
     ("cat", "orange", "an orange cat"), ("x-ray", "", "an x-ray"), ("grapes", "red", "red grapes"),
     ("hourglass", "", "an hourglass"), ("purple grapes", "", "purple grapes"),
     ("ball of yarn", "", "a ball of yarn"), ("dog with a hat", "", "a dog with a hat"),
     ("pancakes with strawberries", "", "pancakes with strawberries")],
)  # fmt: skip
def test_articles(noun: str, adjective: str, phrase: str) -> None:
    assert noun_phrase(np.random.default_rng(0), noun, adjective) == phrase


def test_pairs_and_the_sun() -> None:
    rng = np.random.default_rng(0)
    assert {noun_phrase(rng, "jeans", "blue") for _ in range(50)} == {"blue jeans", "a pair of blue jeans"}
    assert {noun_phrase(rng, "sun") for _ in range(50)} == {"the sun", "a sun"}


def test_no_two_subjects_share_a_name() -> None:
    names = [chosen[0] for text in CHOSEN.values() for chosen in parse_choice(text)[2].values() if chosen]
    assert len(names) == len(set(names))


def test_tables_are_whole_and_name_each_drawing_once() -> None:
    emoji, clip_art = read_table("emoji_names.tsv.gz"), read_table("clipart.tsv.gz")
    assert len(emoji) == len({row["code"] for row in emoji}) == 752
    assert len(clip_art) == len({row["path"] for row in clip_art}) == 951
    assert all(row["creator"] and row["subject"] and None not in row.values() for row in clip_art)
    by_name = [name for name, hand in HANDS.items() if hand.package.startswith("@iconify-json/")]
    assert set(emoji[0]) == {"code", *by_name}
    for name in by_name:  # two emoji of one hand may not show the same drawing
        drawings = [row[name] for row in emoji if row[name]]
        assert len(drawings) == len(set(drawings)) > 300


def test_a_few_percent_of_pairs_are_held_out_and_always_the_same() -> None:
    names = [f"name {i}" for i in range(5000)]
    words = {
        held_out_style: "sticker",
        held_out_colour: "blue",
        held_out_place: "snow",
        held_out_look: "flat",
    }
    for held_out, word in words.items():
        assert 0.03 < np.mean([held_out(name, word) for name in names]) < 0.06
    assert not any(held_out_look(name, "3d") for name in names)
    assert [name for name in names[:60] if held_out_colour(name, "blue")] == ["name 38", "name 55"]


# ---- packages


@pytest.mark.parametrize("hand, command", [("noto", "npm"), ("openclipart", "apt-get")])
def test_a_missing_command_is_one_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hand: str, command: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=f"{command}, and that command was not found"):
        fetch(HANDS[hand], tmp_path / "cache")


@pytest.mark.parametrize("hand, command, ending", [("noto", "npm", "tgz"), ("openclipart", "apt-get", "deb")])
@pytest.mark.parametrize(
    "script, message",
    [("echo 'error: network down' >&2; exit 1", "network down"), ("echo wrong > x.{}", "other bytes"),
     ("true", "no reason given")],
)  # fmt: skip
def test_a_failed_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    hand: str, command: str, ending: str, script: str, message: str,
) -> None:  # fmt: skip
    program = tmp_path / command
    program.write_text(f"#!/bin/sh\n{script.format(ending)}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match=message):
        fetch(HANDS[hand], tmp_path / "cache")
    assert not list((tmp_path / "cache" / "packages").iterdir())


def tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def debian(files: dict[str, bytes]) -> bytes:
    """A Debian package as dpkg writes it. Its first member has an odd length, so a byte follows."""
    members = {"debian-binary": b"2.0", "control.tar.xz": b"", "data.tar.xz": tar(files, "w:xz")}
    headers = {
        name: f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n" for name, data in members.items()
    }
    return b"!<arch>\n" + b"".join(
        headers[name].encode() + data + b"\n" * (len(data) % 2) for name, data in members.items()
    )


@pytest.mark.parametrize("ending, write", [(".tgz", lambda files: tar(files, "w:gz")), (".deb", debian)])
def test_packages_are_read_in_memory(tmp_path: Path, ending: str, write) -> None:
    files = {"./usr/a.svg": b"one", "package/icons.json": b"two", "../../escaped": b"three"}
    archive = tmp_path / f"archive{ending}"
    archive.write_bytes(write(files))
    assert read_package(archive) == {"usr/a.svg": b"one", "icons.json": b"two", "../../escaped": b"three"}
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


# ---- sprites


def test_a_sprite_is_centred_and_fills_the_box() -> None:
    drawing = Image.new("RGBA", (512, 512))
    drawing.paste((200, 0, 0, 255), (20, 40, 220, 140))  # 200 wide, 100 high, off centre
    y, x = np.nonzero(np.asarray(to_sprite(drawing))[..., 3] > 127)
    assert (x.min(), x.max()) == (16, 239)
    assert abs(y.min() + y.max() - 255) <= 1 and y.max() - y.min() + 1 == 112


def test_soft_edges_have_no_dark_rim() -> None:
    drawing = Image.new("RGBA", (512, 512), (0, 0, 0, 0))
    drawing.paste((255, 255, 0, 255), (61, 61, 401, 401))
    sprite = np.asarray(to_sprite(drawing))
    assert (sprite[sprite[..., 3] > 8][:, :2] > 235).all()


def test_an_empty_drawing_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        to_sprite(Image.new("RGBA", (64, 64)))


@pytest.mark.parametrize(
    "subject, category, can",
    [("cat", "animal-mammal", True), ("black cat", "animal-mammal", False), ("orange", "food-fruit", False),
     ("girl", "person", False), ("rainbow", "sky-weather", False)],
)  # fmt: skip
def test_what_can_be_dyed(subject: str, category: str, can: bool) -> None:
    assert library._record(subject, category).dyeable == can


def test_clip_art_of_an_emojis_subject_takes_its_names_and_keeps_its_own_caption() -> None:
    lizard = library._record("lizard", "animal-reptile", ("gecko",))
    drawing = Drawing("openclipart", b"", "", "lizard", "grey lizard", "Benji Park")
    record = describe(drawing, {}, {"lizard": lizard})
    assert record == replace(
        lizard,
        look="clip art",
        hand="openclipart",
        caption="grey lizard",
        licence="public domain",
        creator="Benji Park",
    )
    assert describe(replace(drawing, subject="igloo"), {}, {}).category == "clip art"


# ---- the file


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with all packages, of two emoji and two clip-art drawings, in place of the real ones."""
    named = [name for name, hand in HANDS.items() if hand.package.startswith("@iconify-json/")]
    tables = {
        "emoji_names.tsv.gz": [{"code": code, **dict.fromkeys(named, code)} for code in ("1f408", "1f415")],
        "clipart.tsv.gz": [
            {"path": "a.svg", "creator": "Ann", "subject": "cat", "caption": "red cat"},
            {"path": "b.svg", "creator": "Bob", "subject": "igloo", "caption": ""},
        ],
    }
    tables["emoji_names.tsv.gz"][1]["fxemoji"] = ""  # one hand did not draw the dog
    monkeypatch.setattr(hands, "read_table", tables.__getitem__)
    monkeypatch.setattr(library, "read_table", tables.__getitem__)
    webp = io.BytesIO()
    Image.new("RGBA", (256, 256), (0, 0, 200, 255)).save(webp, "WEBP")
    icons = {"icons": {code: {"body": SQUARE} for code in ("1f408", "1f415")}, "width": 16, "height": 16}
    svg = SVG.format(SQUARE).encode()
    emojibase = {
        "meta/groups.json": json.dumps({"subgroups": {"0": "animal-mammal"}}).encode(),
        "en/data.json": json.dumps(
            [{"label": label, "hexcode": code, "subgroup": 0, "tags": [], "emoji": ""}
             for label, code in (("cat", "1F408"), ("dog", "1F415"), ("badger", "1F9A1"))]
        ).encode(),
    }  # fmt: skip
    for hand in (*HANDS.values(), EMOJIBASE):
        files = {"icons.json": json.dumps(icons).encode()}
        if hand.package.startswith("openclipart"):
            files = {f"./usr/share/openclipart/svg/{name}.svg": svg for name in "ab"}
        elif hand is EMOJIBASE:
            files = emojibase
        elif hand.look == "3d":
            files = {f"assets/{code}.webp": webp.getvalue() for code in ("1f408", "1f415-fe0f")}
        monkeypatch.setattr(library, "Bar", lambda work, **_: work)
        archive = hands.archive_path(hand, tmp_path)
        archive.parent.mkdir(exist_ok=True)
        archive.write_bytes(
            debian(files)
            if archive.suffix == ".deb"
            else tar({f"package/{k}": v for k, v in files.items()}, "w:gz")
        )
    return tmp_path


def test_a_library_has_the_drawings_of_all_hands_and_what_is_known_of_them(packages: Path) -> None:
    path = build_library(packages)
    made = path.stat().st_mtime_ns
    assert build_library(packages) == path and path.stat().st_mtime_ns == made  # built once
    read = read_library(path)
    shown = [(sprite.subject, sprite.hand) for sprite in read.sprites]
    both = [(subject, hand) for hand in list(HANDS)[:-1] for subject in ("cat", "dog")]
    both.remove(("dog", "fxemoji"))
    assert sorted(shown) == sorted([*both, ("cat", "openclipart"), ("igloo", "openclipart")])
    assert read.subjects == ["cat", "dog", "igloo"] and len(read.of["cat"]) == 9
    assert read.pixels.shape == (17, 4, 256, 256)
    square = read.pixels[shown.index(("cat", "noto"))]
    assert square[3].bool().any(0).sum() == 224  # it fills the box
    assert torch.allclose(square[:3, 128, 128].float(), torch.tensor([200.0, 0, 0]), atol=6)
    record = read.sprites[shown.index(("cat", "noto"))]
    assert "red" not in record.stands_out and "green" in record.stands_out
    assert record.foot == 202  # it is 149 pixels high, in the middle
    assert read_library(path, pixels=False).sprites == read.sprites


def test_without_apt_get_the_clip_art_alone_is_missing(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hands.archive_path(HANDS["openclipart"], packages).unlink()
    monkeypatch.setenv("PATH", str(packages))
    with pytest.warns(UserWarning, match=r"apt-get.*without clip art"):
        path = build_library(packages)
    assert {sprite.hand for sprite in read_library(path).sprites} == set(HANDS) - {"openclipart"}
    assert path != library.library_path(packages)  # so it is built anew when apt-get is there


def test_a_made_up_library_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path))
    prepared_library(tmp_path / "mini", NOUNS[:3])
    read = read_library()
    assert read.subjects == NOUNS[:3] and len(read.pixels) == 3 * len(HANDS)
    assert all(isinstance(sprite, Sprite) for sprite in read.sprites)
