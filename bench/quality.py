"""How good is a model? It draws 500 prompts, and a judge and the pixels say what came out right.

`python -m bench.quality --model mini` prints the table and writes bench/quality.json and, as evidence, sheets
of what was drawn into bench/quality/. Every test is put to real pictures of the same prompts too, sent
through the model's own VAE: what they reach is the most that a model can reach here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reifusion.model.pipeline import StableDiffusion, load
from reifusion.model.samplers import SAMPLERS
from reifusion.train.data import DataError, held_out_pictures, pictures
from reifusion.train.loop import TrainingError
from reifusion.train.scenes import Scene, sheet

from . import pixels
from .judge import Judge, choices, fingerprint, get_judge, retrieved, through_vae
from .prompts import COUNTS, QUICK, Prompt, make_prompts, on_white
from .statistics import kid, kid_interval, nearest, too_near, wilson


@dataclass(frozen=True)
class Sampling:
    """How the model draws, unless the command line says otherwise."""

    sampler: str = "euler_a"
    steps: int = 25
    cfg: float = 4.0
    batch: int = 20


@dataclass(frozen=True)
class Row:
    """A line of the table: of the pictures of these kinds, how many have everything right that is needed."""

    name: str
    kinds: tuple[str, ...]  # of prompts
    needs: tuple[str, ...]  # of what `verdict` says
    target: float | None = None


PLACED = ("left or right", "small", "two")
ROWS = (
    Row("subject, among 20", ("plain", "style"), ("subject",), 0.90),
    Row("subject, in a style held out", ("style held out",), ("subject",), 0.60),
    Row("style, among 4", ("style",), ("style",), 0.90),
    Row("style, held out with this subject", ("style held out",), ("style",)),
    Row("background colour", ("background",), ("background",), 0.95),
    Row("  and subject", ("background",), ("background", "subject")),
    Row("dye", ("dye",), ("dye",), 0.80),
    Row("  and subject", ("dye",), ("dye", "subject")),
    Row("dye, held out with this subject", ("dye held out",), ("dye",), 0.60),
    Row("  and subject", ("dye held out",), ("dye", "subject")),
    Row("left, right, small, two: and subject", PLACED, ("place", "subject"), 0.70),
    Row("  left or right: place alone", PLACED[:1], ("place",)),
    Row("  left or right: and subject", PLACED[:1], ("place", "subject")),
    Row("  small: size alone", PLACED[1:2], ("place",)),
    Row("  small: and subject", PLACED[1:2], ("place", "subject")),
    Row("  two: both subjects, each at its side", PLACED[2:], ("place", "subject")),
)
SMALL = 0.4  # extent: "small" is 0.33 in training, and the next size 0.44
GOOD_JUDGE = 0.95  # of the subjects of real pictures that went through the VAE


# ---- judging ----------------------------------------------------------------------------------------------


def draw(pipe: StableDiffusion, prompts: Sequence[Prompt], sampling: Sampling) -> list[np.ndarray]:
    """The model's pictures, (H, W, 3) uint8, each from its prompt's own seed."""
    images: list[np.ndarray] = []
    with tqdm(total=len(prompts), desc="drawing", unit="picture") as bar:
        for kind in dict.fromkeys(prompt.kind for prompt in prompts):
            same = [prompt for prompt in prompts if prompt.kind == kind]  # their seeds count up
            for start in range(0, len(same), sampling.batch):
                batch = same[start : start + sampling.batch]
                drawn = pipe.generate(
                    [prompt.text for prompt in batch],
                    seed=batch[0].seed,
                    sampler_name=sampling.sampler,
                    n_inference_steps=sampling.steps,
                    cfg_scale=sampling.cfg,
                    progress=False,
                )
                images += [np.asarray(picture) for picture in drawn]  # type: ignore[union-attr]
                bar.update(len(batch))
    return images


def verdicts(
    images: Sequence[np.ndarray], prompts: Sequence[Prompt], judge: Judge
) -> tuple[list[dict[str, bool]], Tensor]:
    """For every picture what is right of subject, style, background, dye, place; and features (N, d)."""
    seen = judge.see(images)
    two = [i for i, prompt in enumerate(prompts) if prompt.kind == "two"]
    sides = (
        [judge.see([pixels.halves(images[i])[side] for i in two]).subjects for side in (0, 1)] if two else []
    )
    result = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        tags = prompt.scene.tags
        right = [judge.subjects.index(subject) for subject in tags["subjects"]]
        among = choices(np.random.default_rng([1, prompt.seed]), len(judge.subjects), right)
        # Of two, the first in the tags is on the left.
        scores = [side[two.index(i)] for side in sides] if prompt.kind == "two" else [seen.subjects[i]]
        said = {"subject": all(retrieved(s, r, among) for s, r in zip(scores, right, strict=True))}
        if prompt.kind.startswith("style"):
            said["style"] = judge.styles[int(seen.styles[i].argmax())] == tags["style"]
        elif prompt.kind.startswith("dye"):
            said["dye"] = pixels.dye_name(image) == tags["colours"][0]
        elif prompt.kind == "background":
            said["background"] = pixels.background_name(image) == tags["background"]
        elif prompt.kind == "left or right":
            said["place"] = pixels.side_name(image) == tags["position"]
        elif prompt.kind == "small":
            said["place"] = pixels.extent(image) < SMALL
        elif prompt.kind == "two":
            said["place"] = True  # the two subjects are looked for at their sides
        result.append(said)
    return result, seen.features


# ---- the table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    name: str
    value: float
    low: float  # of its 95 % interval
    high: float
    of: int  # pictures
    real: float  # the same of real pictures, through the VAE
    target: float | None = None
    unit: str = "share"  # or "×10⁻³"


def share(name: str, right: int, of: int, real: float, target: float | None = None) -> Figure:
    return Figure(name, right / of if of else 0.0, *wilson(right, of), of, real, target)


def score(
    prompts: Sequence[Prompt], drawn: Sequence[dict[str, bool]], real: Sequence[dict[str, bool]]
) -> list[Figure]:
    """The figures of `ROWS`, from the verdicts on what was drawn and on real pictures."""
    made = []
    for row in ROWS:
        chosen = [i for i, prompt in enumerate(prompts) if prompt.kind in row.kinds]
        if chosen:
            right, best = (
                sum(all(said[i][need] for need in row.needs) for i in chosen) for said in (drawn, real)
            )
            made.append(share(row.name, right, len(chosen), best / len(chosen), row.target))
    return made


def table(figures: Sequence[Figure]) -> str:
    """The figures as text, a line each."""
    lines = [f"{'':42}{'model':>8}  {'95 %':^15}{'of':>5}{'real':>8}{'target':>9}"]
    for figure in figures:
        scale, form = (100, "{:.1f} %") if figure.unit == "share" else (1000, "{:.2f}")
        value, real = (form.format(scale * x) for x in (figure.value, figure.real))
        interval = f"[{scale * figure.low:.1f}, {scale * figure.high:.1f}]"
        line = f"{figure.name:42}{value:>8}  {interval:^15}{figure.of:>5}{real:>8}"
        if figure.target is not None:
            met = "met" if figure.value >= figure.target else "not met"
            line += f"{f'≥ {100 * figure.target:.0f} %':>9}  {met}"
        lines.append(line)
    return "\n".join(lines)


def describe_judge(judge: Judge, figures: Sequence[Figure], real: Figure, style: Figure) -> str:
    """What the judge itself is worth, before what it says of the model."""
    seen = f"subject {100 * real.value:.1f} % of {real.of}, style {100 * style.value:.1f} % of {style.of}"
    unseen = ", ".join(
        f"{name} {100 * right / of:.1f} % of {of}" for name, (right, of) in judge.unseen.items()
    )
    text = f"judge {judge.id}, on real pictures: {seen}; on drawings it was not trained on: {unseen}"
    if min(figure.real for figure in figures if figure.name == "subject, among 20") < GOOD_JUDGE:
        text += "\nThis judge cannot tell: it fails on real pictures, so what it says of others means little."
    return text


# ---- the evaluation ---------------------------------------------------------------------------------------


def quick_score(
    pipe: StableDiffusion, count: int = 40, sampling: Sampling = Sampling(steps=12)
) -> dict[str, Any]:
    """For checkpoints of a training: of `count` plain prompts, the share with the right subject among 20."""
    prompts = make_prompts(counts={"plain": count})
    said, _ = verdicts(draw(pipe, prompts, sampling), prompts, get_judge())
    right = sum(each["subject"] for each in said)
    low, high = wilson(right, count)
    return {"subject": right / count, "low": low, "high": high, "of": count}


def evaluate(pipe: StableDiffusion, sampling: Sampling, quick: bool, evidence: Path | None) -> dict[str, Any]:
    """Everything that is reported: figures, settings, hashes, and the table as text.

    quick: one prompt in `QUICK`, and neither KID nor memorisation. evidence: a folder for sheets, or None.
    """
    began = time.time()
    judge = get_judge()
    prompts = make_prompts(counts={kind: n // QUICK for kind, n in COUNTS.items()} if quick else COUNTS)
    scenes = [prompt.scene.image for prompt in prompts]
    images, rebuilt = draw(pipe, prompts, sampling), through_vae(pipe, scenes)
    drawn, features = verdicts(images, prompts, judge)
    real, real_features = verdicts(rebuilt, prompts, judge)
    figures = score(prompts, drawn, real)
    untouched, _ = verdicts(scenes, prompts, judge)
    about = []
    for name in ("subject", "style"):
        hits = [said[name] for said in untouched if name in said]
        about.append(share(f"judge: {name}", sum(hits), len(hits), sum(hits) / len(hits)))
    if not quick:
        figures.append(_distance(prompts, features, real_features, judge))
        figures += _memory(prompts, images, rebuilt, judge, evidence)
    if evidence is not None:
        for kind in COUNTS:
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind == kind][:32]
            marked = [_marked(images[i], prompts[i].text, drawn[i]) for i in chosen]
            save_picture(sheet(marked), evidence / f"{kind.replace(' ', '-')}.png")
    text = f"{describe_judge(judge, figures, *about)}\n\n{table(figures)}"
    return {
        "model": {
            "name": pipe.config.name,
            "sha256": fingerprint(*pipe.models.values()),
            "dtype": str(pipe.dtype),
        },
        "judge": {"id": judge.id, "sha256": fingerprint(judge.model), "unseen": judge.unseen},
        "settings": asdict(sampling) | {"quick": quick, "prompts": len(prompts), "torch": torch.__version__},
        "figures": [asdict(figure) for figure in (*about, *figures)],
        "seconds": round(time.time() - began),
        "table": text,
    }


def _distance(prompts: Sequence[Prompt], drawn: Tensor, real: Tensor, judge: Judge) -> Figure:
    """KID between drawings that the model was trained on, as it draws them, and those held out.

    In the three styles that have any held out. `real` is the floor: the same drawings through the VAE.
    """
    mine = [i for i, p in enumerate(prompts) if p.kind == "style" and p.scene.tags["style"] != "3d"]
    theirs = judge.see([on_white(sprite) for sprite in held_out_pictures()[0]]).features
    x, floor = drawn[mine], kid(real[mine], theirs)
    return Figure(
        "KID to held-out pictures, ×10³", kid(x, theirs), *kid_interval(x, theirs), len(x), floor, unit=""
    )


def _memory(
    prompts: Sequence[Prompt],
    images: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray],
    judge: Judge,
    evidence: Path | None,
) -> list[Figure]:
    """Two shares of pictures that are too near to a training picture, each by features and by pixels.

    First where the model was trained on the drawing that was asked for, so `real` is a copy of it. Then where
    it never was: there `real` tells how often other drawings are as near without being copies.
    """
    sprites, records = pictures()
    training = [on_white(sprite) for sprite in sprites]
    figures, near = [], {}
    for measure, points in (("features", lambda x: judge.see(x).features), ("pixels", thumbnails)):
        theirs, names = points(training), [picture.subject for picture in records]
        for kinds, name in ((("plain", "style"), "too near"), (("style held out",), "too near, held out")):
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind in kinds]
            subjects = [prompts[i].scene.tags["subjects"][0] for i in chosen]
            drawn, real = points([images[i] for i in chosen]), points([rebuilt[i] for i in chosen])
            count, best = (too_near(x, subjects, theirs, names) for x in (drawn, real))
            figures.append(share(f"{name}, by {measure}", count, len(chosen), best / len(chosen)))
            if kinds == ("plain", "style"):
                near[measure] = dict(zip(chosen, nearest(drawn, theirs)[1].tolist()))
    if evidence is not None:
        tiles, asked = [], list(near["pixels"])
        for i in asked[:: -(-len(asked) // 24)]:  # 24 of them, evenly
            tiles.append(Scene(images[i], prompts[i].text, {}))
            for measure, place in near.items():
                twin = records[place[i]]
                tiles.append(Scene(training[place[i]], f"by {measure}: {twin.style} {twin.subject}", {}))
        save_picture(sheet(tiles, columns=9), evidence / "nearest.png")
    return figures


def thumbnails(images: Sequence[np.ndarray]) -> Tensor:
    """(N, 3·32·32) in [0, 1]"""
    small = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).float().flatten(1) / 255


def _marked(image: np.ndarray, text: str, said: dict[str, bool]) -> Scene:
    wrong = ", ".join(name for name, right in said.items() if not right)
    return Scene(image, f"{text} (wrong: {wrong})" if wrong else text, {})


def save_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    picture.save(temporary)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    """`python -m bench.quality …`; returns the exit code."""
    usual = Sampling()
    parser = argparse.ArgumentParser("python -m bench.quality", description=__doc__)
    parser.add_argument("--model", default="mini", help="as in reifusion generate (%(default)s)")
    parser.add_argument("--sampler", default=usual.sampler, choices=sorted(SAMPLERS), help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=usual.steps, help="(%(default)s)")
    parser.add_argument("--cfg", type=float, default=usual.cfg, help="guidance (%(default)s)")
    parser.add_argument("--batch", type=int, default=usual.batch, help="pictures at a time (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="60 prompts in about a minute, and no files")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the report (%(default)s)")
    given = parser.parse_args(arguments)
    for name in ("steps", "batch"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    sampling = Sampling(given.sampler, given.steps, given.cfg, given.batch)
    try:
        pipe = load(given.model)
    except ValueError as error:
        parser.error(str(error))
    try:
        report = evaluate(pipe, sampling, given.quick, None if given.quick else given.out / "quality")
        print(report["table"])
        if not given.quick:
            path = given.out / "quality.json"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            print(f"\nwritten: {path}, and what was drawn in {given.out / 'quality'}")
    except (DataError, TrainingError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "quality: stopped; if the judge was training, the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
