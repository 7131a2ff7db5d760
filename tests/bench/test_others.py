"""Other artists' drawings, from the smallest possible packages."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import others
from bench.others import EMOJIONE, LICENCES, OPENMOJI, PACKAGES, TWEMOJI
from reifusion.train.mini.sprites import EMOJIBASE, SIDE

RED, GREEN, BLUE = "#ff0000", "#00ff00", "#0000ff"


def pack(cache: Path, package: str, files: dict[str, Any]) -> None:
    archive = cache / "packages" / f"{package.strip('@').replace('/', '-')}.tgz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            text = json.dumps(content).encode()
            about = tarfile.TarInfo(f"package/{name}")
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))


def icon_set(colour: str, chars: dict[str, str], *names: str) -> dict[str, Any]:
    body = f'<rect x="4" y="4" width="8" height="4" fill="{colour}"/>'
    return {"icons.json": {"icons": {name: {"body": body} for name in names}}, "chars.json": chars}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    emojis = [
        {"label": label, "hexcode": code, "subgroup": 1, "emoji": "", "tags": []}
        for label, code in (("frog", "1F438"), ("peacock", "1F99A"))
    ]
    subgroups = {"1": "animal-amphibian"}
    pack(tmp_path, EMOJIBASE, {"en/data.json": emojis, "meta/groups.json": {"subgroups": subgroups}})
    pack(tmp_path, TWEMOJI, icon_set(RED, {"1f438": "frog"}, "frog"))
    pack(tmp_path, OPENMOJI, icon_set(GREEN, {"1f438-fe0f": "frosch"}, "frosch"))
    pack(tmp_path, EMOJIONE, icon_set(BLUE, {}, "frog"))
    return tmp_path


def test_each_artist_draws_the_subject_under_its_own_name(cache: Path) -> None:
    sprites, records = others.other_pictures(["frog"], cache)
    assert [picture.style for picture in records] == list(PACKAGES)
    assert [picture.licence for picture in records] == list(LICENCES.values())
    assert {picture.subject for picture in records} == {"frog"}  # the peacock is no amphibian
    middles = sprites[:, SIDE // 2, SIDE // 2]
    assert np.array_equal(middles, [[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 255, 255]])


def test_an_artist_who_never_drew_it_is_left_out(cache: Path) -> None:
    pack(cache, OPENMOJI, icon_set(GREEN, {}))
    assert [picture.style for picture in others.other_pictures(["frog"], cache)[1]] == [TWEMOJI, EMOJIONE]


def test_subjects_that_the_mini_does_not_know_are_left_out(cache: Path) -> None:
    with pytest.raises(ValueError, match="peacock"):
        others.other_pictures(["peacock"], cache)
