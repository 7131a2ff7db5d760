"""The toy world in the studio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
from fastapi.testclient import TestClient

from reifusion.explain.toy import SPREAD
from reifusion.studio.routes import Studio, build
from reifusion.studio.toy import GRID, POINTS, SAMPLERS, journey


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_points_come_from_noise_to_the_data(sampler):
    found = journey("moons", sampler, 40, 0, 3)
    frames, data = torch.tensor(found["frames"]), torch.tensor(found["data"])
    assert frames.shape[1:] == (POINTS, 2) and len(frames) == len(found["times"]) + 1
    first, last = (torch.cdist(frames[k], data).amin(1) for k in (0, -1))
    assert first.median() > 0.15 and last.median() < 2 * SPREAD
    assert len(found["arrows"]) == len(found["times"]) and len(found["grid"]) == GRID**2


def test_arrows_point_to_the_data_and_the_word_chooses_its_half():
    found = journey("moons", "ddim", 20, 1, 0)
    data, labels = torch.tensor(found["data"]), torch.tensor(found["labels"])
    mine, others = data[labels == 0], data[labels == 1]
    tips = torch.tensor(found["grid"]) + torch.tensor(found["arrows"][14])  # where little noise is left
    assert torch.cdist(tips, mine).amin(1).median() < 0.1
    last = torch.tensor(found["frames"][-1])
    assert (torch.cdist(last, mine).amin(1) < torch.cdist(last, others).amin(1)).float().mean() > 0.95
    both = torch.tensor(journey("moons", "ddim", 20, 0, 0)["frames"][-1])
    share = (torch.cdist(both, mine).amin(1) < torch.cdist(both, others).amin(1)).float().mean()
    assert 0.35 < share < 0.65


def test_the_page_asks_and_is_told_what_is_wrong(tmp_path: Path):
    client = TestClient(build(Studio("mini", tmp_path)), base_url="http://127.0.0.1")
    asked: dict[str, Any] = {"world": "spiral", "sampler": "ddim", "steps": 5, "guidance": 2, "seed": 1}
    assert len(client.get("/api/toy", params=asked).json()["frames"]) == 6
    assert "toy.js" in client.get("/toy").text and "/toy" in client.get("/").text
    for wrong, said in (
        ({"world": "mars"}, "there is no 'mars' in the toy world"),
        ({"sampler": "lms"}, "there is no 'lms'"),
        ({"steps": 0}, "steps are 1 to 100"),
        ({"guidance": "nan"}, "guidance 0 to 20"),
        ({"seed": -1}, "a seed is 0 to"),
    ):
        answer = client.get("/api/toy", params=asked | wrong)
        assert answer.status_code == 400 and said in answer.json()["note"], answer.text
