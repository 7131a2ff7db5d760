"""The curve's promises: its numbers are right, even if the log is damaged or still being written."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reifusion.train.__main__ import main
from reifusion.train.checkpoint import TrainingError
from reifusion.train.plot import losses, plot, smoothed, verdict
from reifusion.train.progress import Progress, Seen

BAND = [[0, 0.8, 1.2], [50, 0.5, 0.7], [100, 0.4, 0.6]]


def write(folder, rows, tail=""):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"step": step, "loss": loss, "time": 1.0}) + "\n" for step, loss in rows)
    (folder / "training.jsonl").write_text(lines + tail)
    return folder


def colours(path) -> set[tuple[int, ...]]:
    return set(map(tuple, np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()))


def test_curves_and_band_are_in_the_picture(tmp_path):
    runs = [
        write(tmp_path / name, [(s, 1 / (1 + s / scale)) for s in range(0, 100, 5)])
        for name, scale in (("one", 50), ("two", 30))
    ]
    plot(runs[0], [], tmp_path / "plain.png")
    plot(runs[0], BAND, tmp_path / "band.png")
    plot([runs[0], runs[1] / "training.jsonl"], BAND, tmp_path / "both.png")
    blue, orange, green = (31, 119, 180), (255, 127, 14), (222, 240, 222)
    found = [colours(tmp_path / f"{name}.png") for name in ("plain", "band", "both")]
    assert [blue in c for c in found] == [True] * 3
    assert [orange in c for c in found] == [False, False, True]

    def near(c) -> bool:
        return bool((np.abs(np.array(list(c)) - green).max(1) <= 4).any())

    assert [near(c) for c in found] == [False, True, True]
    assert Image.open(tmp_path / "both.png").size == (1200, 675)


def test_log_of_a_run_that_was_killed_or_is_writing_is_read(tmp_path):
    rows = [(0, 3.0), (20, 2.0), (40, float("nan")), (40, 1.5), (20, 1.75)]
    run = write(tmp_path / "run", rows, tail='{"step": 60, "lo')
    assert losses(run) == {0: 3.0, 20: 1.75}  # that of 40 is of weights that are gone
    plot(run, BAND, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("content", ["", "\n\n", "not json\n", '{"step": 3}\n', '{"step": 1, "loss": NaN}\n'])
def test_log_without_losses_is_one_sentence(tmp_path, content):
    (tmp_path / "training.jsonl").write_text(content)
    with pytest.raises(TrainingError, match="has no losses yet"):
        plot(tmp_path, BAND, tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_missing_log_is_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match=r"there is no .*nowhere/training\.jsonl: nothing has been"):
        plot(tmp_path / "nowhere", BAND, tmp_path / "curve.png")


@pytest.mark.parametrize("band", [[[0, 1]], [[0, 2, 1]], [[0, float("nan"), 1]]])
def test_malformed_band_is_refused(tmp_path, band):
    run = write(tmp_path / "run", [(0, 1.0)])
    with pytest.raises(TrainingError, match="rows of step, low and high"):
        plot(run, band, tmp_path / "curve.png")


def test_unknown_kind_of_picture_leaves_no_file(tmp_path):
    run = write(tmp_path / "run", [(0, 1.0)])
    with pytest.raises(TrainingError, match=r"cannot be drawn to .*curve\.xyz"):
        plot(run, BAND, tmp_path / "curve.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_losses_below_zero_and_bands_of_one_step_are_drawn(tmp_path):
    run = write(tmp_path / "run", [(0, 1.0), (20, -1.0)])
    plot(run, [[20, 0.5, 0.6]], tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size == (1200, 675)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(0, 8))
def test_smoothed_course_is_the_mean_of_the_neighbours(values, reach):
    course = smoothed(values, reach)
    assert len(course) == len(values)
    for i, mean in enumerate(course):
        near = [value for k, value in enumerate(values) if abs(k - i) <= reach]
        assert mean == pytest.approx(math.fsum(near) / len(near), abs=1e-9)


# Does it overfit?


@pytest.mark.parametrize(
    ("held_out", "seen", "says"),
    [
        ([1.0, 0.8, 0.7, 0.6], [1.0, 0.7, 0.5, 0.3], "lowest, 0.6, at step 40$"),
        ([1.0, 0.8, 0.81, 0.9], [1.0, 0.7, 0.5, 0.3], "lowest, 0.8, at step 20, and is 0.9$"),  # only once
        ([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.8, 0.8], "no sign"),  # it learns nothing at all
        ([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.5, 0.3], "since step 20 .* from 0.8 to 0.95, .* 0.7 to 0.3;"),
        ([1.0], [1.0], "^$"),
        ([], [], "^$"),
    ],
)
def test_a_run_overfits_if_only_the_loss_on_what_it_learns_falls(held_out, seen, says):
    overfits, sentence = verdict(*({10 * i + 10: x for i, x in enumerate(each)} for each in (held_out, seen)))
    assert re.search(says, sentence) and overfits == sentence.startswith("it overfits")


def test_a_run_that_overfits_says_so_while_it_trains_and_in_its_plot(tmp_path, capsys):
    course = [(0.9, 0.9), (0.5, 0.4), (0.6, 0.3), (0.7, 0.2)]
    with Progress(tmp_path, 0, 4, 1) as progress:
        for step, (held_out, seen) in enumerate(course):
            progress.step(step, 1, {"loss": seen})
            progress.show(step, Seen(None, {"held_out": held_out, "seen": seen}))
    said = capsys.readouterr().err
    assert "step 1: the loss is 0.5 on pictures held out and 0.4 on those learned" in said
    assert said.count("it overfits: since step 1 the loss") == 1
    assert main(["text2image", f"folder={tmp_path}", "--plot"]) == 0
    assert "it overfits: since step 1 the loss" in capsys.readouterr().out
    with Progress(tmp_path, 0, 4, 1) as progress:  # begun anew, in the same folder
        progress.step(0, 1, {"loss": 0.9})
        progress.show(0, Seen(None, {"held_out": 0.9, "seen": 0.9}))
    assert losses(tmp_path, "held_out") == {0: 0.9}
