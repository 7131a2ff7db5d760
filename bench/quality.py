"""Measures how good a model is: it draws 500 prompts, and a judge and the pixels check the pictures.

`python -m bench.quality` prints the table and writes bench/quality.json and, as evidence, sheets of pictures
into bench/quality-sheets/. Every test is also applied to real pictures of the same prompts, sent through the
model's own VAE: their results are the most that a model can reach here. A model may have any size: pictures are
judged at 256 × 256.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reifusion.api import load
from reifusion.files import whole
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.train.estimates import mean, nearest, spread, too_near, wilson
from reifusion.train.images import DataError
from reifusion.train.loop import TrainingError
from reifusion.train.mini.compose import is_held_out
from reifusion.train.mini.library import SIDE, Library, default_cache, read_library
from reifusion.train.mini.render import scene_sheet

from . import pixels
from .judge import Judge, as_input, choices, fingerprint, get_judge, retrieved
from .pixels import on_white, resized
from .prompts import COUNTS, SEEDS, Prompt, make_prompts

CARD = Path(__file__).parents[1] / "reifusion" / "data" / "MODEL_CARD.md"
BATCH = 20  # pictures drawn at a time
GOOD_JUDGE = 0.9  # the share of unseen drawings whose subject the judge has to find


@dataclass(frozen=True)
class Row:
    """A line of the table: the share of the pictures of these kinds in which all `needs` are right."""

    name: str
    kinds: tuple[str, ...]  # of prompts
    needs: tuple[str, ...]  # keys of `verdicts`
    target: float | None = None


PLACED = ("left or right", "small", "two")
ROWS = (
    Row("subject, among 20", ("plain", "look"), ("subject",), 0.97),
    Row("look, where the prompt names it", ("look",), ("manner",)),
    Row(
        "style, never seen of this subject: style and subject",
        ("style held out",),
        ("manner", "subject"),
        0.85,
    ),
    Row("  style alone", ("style held out",), ("manner",)),
    Row("style, seen of this subject: style and subject", ("style",), ("manner", "subject")),
    Row("background and subject", ("background",), ("background", "subject"), 0.95),
    Row("  background alone", ("background",), ("background",)),
    Row("dye and subject", ("dye",), ("dye", "subject"), 0.95),
    Row("  dye alone", ("dye",), ("dye",)),
    Row("dye, never seen of this subject: dye and subject", ("dye held out",), ("dye", "subject"), 0.95),
    Row("  dye alone", ("dye held out",), ("dye",)),
    Row("left, right, small, two: where and subject", PLACED, ("where", "subject"), 0.95),
    Row("  left or right", PLACED[:1], ("where", "subject")),
    Row("  small", PLACED[1:2], ("where", "subject")),
    Row("  two, each at its side", PLACED[2:], ("where", "subject")),
    Row("place and subject", ("place",), ("place", "subject")),
    Row("place, never seen with this subject: both", ("place held out",), ("place", "subject")),
    Row("  place alone", ("place held out",), ("place",)),
)
UNITS = {
    "share": (100, 1, " %"),
    "ratio": (1, 2, ""),
    "dB": (1, 2, " dB"),
    "s": (1, 2, " s"),
    "MiB": (1, 1, " MiB"),
}


@dataclass(frozen=True)
class Figure:
    """A reported number with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    of: int  # the number of pictures
    real: float | None = None  # the same number for real pictures, through the VAE
    target: float | None = None  # the least value that is good enough
    unit: str = "share"  # one of UNITS
    at_most: bool = False  # then the target is the greatest value

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    @classmethod
    def read(cls, row: dict[str, Any]) -> Figure:
        """Reads a figure from a line of the report."""
        return cls(**{name: value for name, value in row.items() if name != "met"})

    def texts(self) -> tuple[str, ...]:
        """Returns the cells of a table: name, value, interval, pictures, real, target, and if it is met."""
        scale, digits, unit = UNITS[self.unit]

        def text(x: float | None) -> str:
            return "" if x is None else f"{scale * x:.{digits}f}"

        sign = "≤" if self.at_most else "≥"
        target = "" if self.target is None else f"{sign} {scale * self.target:g}{unit}"
        met = {None: "", True: "met", False: "not met"}[self.met]
        interval = f"{text(self.low)} – {text(self.high)}"
        return self.name, text(self.value) + unit, interval, str(self.of), text(self.real), target, met


HEAD = ("", "model", "95 %", "of", "real", "target", "")


def share(name: str, right: int, of: int, real: float | None = None, target: float | None = None) -> Figure:
    return Figure(name, right / of if of else 0.0, *wilson(right, of), of, real, target)


def table(figures: Sequence[Figure]) -> str:
    """Returns the figures as text, a line each."""
    rows = [HEAD, *(figure.texts() for figure in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
        for row in rows
    )


# ---- drawing and judging ----------------------------------------------------------------------------------


def draw(
    pipe: StableDiffusion, prompts: Sequence[Prompt], settings: dict[str, Any], folder: Path
) -> list[np.ndarray]:
    """Draws the model's pictures, (256, 256, 3) uint8 whatever its size, each from its prompt's own seed.

    They are kept in the folder as they were drawn, and existing pictures are not drawn again.
    """

    def path(prompt: Prompt) -> Path:
        return folder / f"{hashlib.sha256(f'{prompt.seed} {prompt.text}'.encode()).hexdigest()[:16]}.png"

    with tqdm(total=len(prompts), desc="drawing", unit="picture") as bar:
        for kind in dict.fromkeys(prompt.kind for prompt in prompts):
            same = [prompt for prompt in prompts if prompt.kind == kind]  # their seeds count up
            for start in range(0, len(same), BATCH):
                batch = same[start : start + BATCH]
                if not all(path(prompt).exists() for prompt in batch):
                    texts = [prompt.text for prompt in batch]
                    drawn = pipe.generate(texts, seed=batch[0].seed, progress=False, **settings)
                    for prompt, picture in zip(batch, drawn, strict=True):
                        save_picture(picture, path(prompt))
                bar.update(len(batch))
    return [resized(np.asarray(Image.open(path(prompt))), SIDE) for prompt in prompts]


def through_vae(pipe: StableDiffusion, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encodes and decodes pictures (H, W, 3) uint8 at the model's own size."""
    back = []
    for start in tqdm(range(0, len(images), 16), desc="through the VAE", unit="16 pictures", mininterval=10):
        some = images[start : start + 16]
        x = as_input(np.stack([resized(image, pipe.config.size) for image in some]))
        decoded = pipe.decode(pipe.encode_image(x))
        back += [resized(np.asarray(y), len(image)) for y, image in zip(decoded, some, strict=True)]
    return back


def verdicts(
    images: Sequence[np.ndarray], prompts: Sequence[Prompt], judge: Judge
) -> tuple[list[dict[str, bool]], Tensor]:
    """Returns what is right in every picture (subject, manner, background, …), and features (N, d)."""
    seen = judge.see(images)
    scores, features = seen.subjects.clone(), seen.features
    outside = [i for i, prompt in enumerate(prompts) if prompt.scene.place]
    if outside:  # there the foreground is everything
        there = judge.see([images[i] for i in outside], outside=True)
        scores[outside] = there.subjects
        places = dict(zip(outside, there.places, strict=True))
    two = [i for i, prompt in enumerate(prompts) if prompt.kind == "two"]
    halves = [half for i in two for half in pixels.halves(images[i])]
    sides = judge.see(halves).subjects if two else torch.empty(0)  # left, right, left, right, …
    result = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        scene = prompt.scene
        right = [judge.subjects.index(subject) for subject in scene.subjects]
        among = choices(np.random.default_rng([1, prompt.seed]), len(judge.subjects), right)
        # Of two subjects, the first in the scene is on the left.
        views = sides[2 * two.index(i) :][:2] if prompt.kind == "two" else scores[i : i + 1]
        said = {"subject": all(retrieved(s, r, among) for s, r in zip(views, right, strict=True))}
        if prompt.kind == "look" or scene.style:
            said["manner"] = seen.manners[i] == (scene.style or scene.look)
        if prompt.kind.startswith("dye"):
            said["dye"] = pixels.dye_name(image) == scene.colours[0]
        elif prompt.kind == "background":
            said["background"] = pixels.background_name(image) == scene.background
        elif prompt.kind == "left or right":
            said["where"] = pixels.side_name(image) == scene.position
        elif prompt.kind == "small":
            said["where"] = pixels.extent(image) < pixels.SMALL
        elif prompt.kind == "two":
            said["where"] = True  # the two subjects are looked for at their sides
        elif scene.place:
            said["place"] = places[i] == scene.place
        result.append(said)
    return result, features


# ---- the figures ------------------------------------------------------------------------------------------


def examined(judge: Judge) -> list[Figure]:
    """Returns figures for the judge itself, which come before its verdicts on the model.

    They are from before it learned the drawings on which it was examined.
    """

    def of(name: str, looks: Sequence[str], target: float | None = None) -> Figure:
        right, count = np.sum([judge.unseen[look] for look in looks], axis=0).tolist()
        return share(name, right, count, target=target)

    everything = of("the judge itself: drawings it had not seen", list(judge.unseen), GOOD_JUDGE)
    return [everything, *(of(f"  of the look {look}", [look]) for look in judge.unseen)]


def score(
    prompts: Sequence[Prompt], drawn: Sequence[dict[str, bool]], real: Sequence[dict[str, bool]]
) -> list[Figure]:
    """Returns the figures of `ROWS`, from the verdicts on the model's pictures and on real ones."""
    made = []
    for row in ROWS:
        chosen = [i for i, prompt in enumerate(prompts) if prompt.kind in row.kinds]
        if chosen:
            right, best = (
                sum(all(said[i][need] for need in row.needs) for i in chosen) for said in (drawn, real)
            )
            made.append(share(row.name, right, len(chosen), best / len(chosen), row.target))
    return made


def differing(prompts: Sequence[Prompt], features: Tensor, library: Library, judge: Judge) -> Figure:
    """Returns how much the pictures of one prompt differ, beside how much the drawings of its subject differ.

    features (N, d): the judge's, of the model's pictures.
    """
    of: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if prompt.kind == "seeds":
            of.setdefault(prompt.text, []).append(i)
    ratios = []
    for places in of.values():
        if len(places) == SEEDS:
            drawings = library.pixels[library.of[prompts[places[0]].scene.subjects[0]]]
            ratios.append(spread(features[places]) / spread(judge.see(on_white(drawings)).features))
    value, low, high = mean(torch.tensor(ratios))
    count = SEEDS * len(ratios)
    return Figure("do seeds differ? ÷ real drawings", value, low, high, count, 1.0, 0.6, "ratio")


def small_parts(
    prompts: Sequence[Prompt], images: Sequence[np.ndarray], real: Sequence[np.ndarray], judge: Judge
) -> list[Figure]:
    """Returns how often a part of a picture, with its small details, shows whose part it is: among 20.

    As a share, and beside the same share of real pictures.
    """
    chosen = [i for i, prompt in enumerate(prompts) if prompt.kind in ("plain", "look")]

    def known(pictures: Sequence[np.ndarray]) -> Tensor:
        """(N,): the share of each picture's parts that the judge knows"""
        shares = []
        for i, scores in zip(chosen, judge.see_parts([pictures[i] for i in chosen]), strict=True):
            right = judge.subjects.index(prompts[i].scene.subjects[0])
            among = choices(np.random.default_rng([1, prompts[i].seed]), len(judge.subjects), [right])
            shares.append(np.mean([retrieved(part, right, among) for part in scores]))
        return torch.tensor(shares)

    best, (value, low, high) = known(real).mean().item(), mean(known(images))
    figure = Figure(
        "small parts, ÷ real pictures", value / best, low / best, high / best, len(chosen), 1.0, 0.85, "ratio"
    )
    return [figure, Figure("  parts that show whose they are", value, low, high, len(chosen), best)]


def memory(
    prompts: Sequence[Prompt],
    images: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray],
    library: Library,
    folder: Path | None,
) -> Figure:
    """Returns the share of pictures that are nearer to a drawing than two drawings of the subject are.

    `real` are copies of drawings. 24 pictures and their nearest drawings go into the folder, if there is one.
    """
    training = on_white(library.pixels)
    theirs, names = thumbnails(training), [sprite.subject for sprite in library.sprites]
    several = [
        i
        for i, p in enumerate(prompts)
        if p.kind in ("plain", "look") and len(library.of[p.scene.subjects[0]]) > 1
    ]
    subjects = [prompts[i].scene.subjects[0] for i in several]

    def near(pictures: Sequence[np.ndarray]) -> int:
        both = [[pictures[i], pictures[i][:, ::-1]] for i in several]  # scenes may be mirrored
        views = (thumbnails([pair[k] for pair in both]) for k in (0, 1))
        found = [too_near(view, subjects, theirs, names) for view in views]
        return sum(a or b for a, b in zip(*found, strict=True))

    if folder is not None:
        tiles, captions = [], []
        for i in several[:: -(-len(several) // 24)]:  # 24 of them, evenly
            place = int(nearest(thumbnails([images[i]]), theirs)[1])
            tiles += [images[i], training[place]]
            captions += [prompts[i].text, f"nearest: {library.sprites[place].look} {names[place]}"]
        save_sheet(tiles, captions, folder / "nearest.png")
    name = "nearer to a drawing than those are to one another"
    best = near(rebuilt) / len(several)
    return replace(share(name, near(images), len(several), best, 0.03), at_most=True)


def thumbnails(images: Sequence[np.ndarray]) -> Tensor:
    """(N, 3·32·32) in [0, 1]: the foregrounds, so that size and place do not matter"""
    return torch.from_numpy(np.stack([pixels.crop(image, 32) for image in images])).float().flatten(1) / 255


def psnr(
    name: str, pipe: StableDiffusion, images: Sequence[np.ndarray], target: float | None = None
) -> Figure:
    """Returns how well pictures (H, W, 3) uint8 come back from the VAE, at the model's own size."""
    images = [resized(image, pipe.config.size) for image in images]
    error = np.stack(through_vae(pipe, images)).astype(np.float32) - np.stack(images)
    mse = torch.from_numpy(error).square().mean((1, 2, 3)).clamp(min=1e-3)  # (N, H, W, 3) -> (N,)
    # PSNR = 10 log₁₀(255² / MSE), in dB
    return Figure(name, *mean(10 * torch.log10(255**2 / mse)), len(images), target=target, unit="dB")


def speed(pipe: StableDiffusion, settings: dict[str, Any]) -> Figure:
    """Returns the seconds for one picture, after a warm-up: the median of 5, the quickest and the slowest."""
    times = []
    for seed in range(6):
        began = time.perf_counter()
        pipe.generate("a cat", seed=seed, progress=False, **settings)
        times.append(time.perf_counter() - began)
    times = sorted(times[1:])
    return Figure("seconds for one picture", times[2], times[0], times[-1], 5, None, 1.5, "s", at_most=True)


def weight(model: str) -> list[Figure]:
    """Returns the size of the model's file; of a model that is no file, nothing."""
    path = CARD.with_name("mini.safetensors") if model == "mini" else Path(model)
    if not path.is_file():
        return []
    size = path.stat().st_size / 2**20
    return [Figure("weights", size, size, size, 1, None, 34, "MiB", at_most=True)]


# ---- the evaluation ---------------------------------------------------------------------------------------


def evaluate(
    pipe: StableDiffusion, settings: dict[str, Any], count: int, evidence: Path | None
) -> dict[str, Any]:
    """Returns the whole report: figures, settings and hashes.

    settings: arguments of `generate`. count: the number of prompts. evidence: a folder for sheets, or None.
    """
    began = time.time()
    judge, library = get_judge(), read_library()
    model = {"name": pipe.config.name, "sha256": fingerprint(*pipe.models.values()), "dtype": str(pipe.dtype)}
    id = hashlib.sha256(json.dumps([model, settings]).encode()).hexdigest()[:8]
    quick = speed(pipe, settings)
    prompts = make_prompts(library, portion(count))
    images = draw(pipe, prompts, settings, default_cache().parent / f"quality-{id}")
    rebuilt = through_vae(pipe, [prompt.image for prompt in prompts])
    drawn, features = verdicts(images, prompts, judge)
    real, _ = verdicts(rebuilt, prompts, judge)
    unseen = [i for i, sprite in enumerate(library.sprites) if is_held_out(sprite)]
    figures = [
        *examined(judge),
        *score(prompts, drawn, real),
        differing(prompts, features, library, judge),
        *small_parts(prompts, images, rebuilt, judge),
        memory(prompts, images, rebuilt, library, evidence),
        psnr("VAE, pictures that no training saw", pipe, on_white(library.pixels[unseen]), 34.0),
        quick,
    ]
    if evidence is not None:
        for kind in COUNTS:
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind == kind][:32]
            captions = [_marked(prompts[i].text, drawn[i]) for i in chosen]
            save_sheet([images[i] for i in chosen], captions, evidence / f"{kind.replace(' ', '-')}.png")
    return {
        "model": model,
        "judge": {"id": judge.id, "sha256": fingerprint(judge.model)},
        "settings": settings
        | {"prompts": count, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        "seconds": round(time.time() - began),
    }


def portion(count: int) -> dict[str, int]:
    """Returns the counts of `count` prompts in all, in the proportions of `COUNTS`."""
    ends = np.cumsum([0, *COUNTS.values()]) * count // sum(COUNTS.values())
    return dict(zip(COUNTS, np.diff(ends).tolist(), strict=True))


def _marked(text: str, said: dict[str, bool]) -> str:
    wrong = ", ".join(name for name, right in said.items() if not right)
    return f"{text} (wrong: {wrong})" if wrong else text


# ---- on disk ----------------------------------------------------------------------------------------------


def save_picture(picture: Image.Image, path: Path) -> None:
    with whole(path) as temporary:
        picture.save(temporary, "PNG")


def save_sheet(images: Sequence[np.ndarray], captions: list[str], path: Path) -> None:
    if images:
        sheet = scene_sheet(as_input(np.stack(images)), captions)
        save_picture(sheet.quantize(256), path)  # a clone carries it: a quarter of the bytes


def save_text(text: str, path: Path) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def with_figures(card: str, figures: Sequence[Figure]) -> str:
    """Returns the model card with a new table of figures between the two marks."""
    start, end = "<!-- python -m bench.quality --card -->\n", "<!-- end -->"
    before, _, rest = card.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the model card lacks the marks {start.strip()} and {end}")
    head = ("figure", *HEAD[1:])
    rows = [head, ("---", *["---:"] * (len(head) - 2), "---"), *(figure.texts() for figure in figures)]
    return before + start + "".join(f"| {' | '.join(row)} |\n" for row in rows) + end + after


def write_card(report: Path) -> int:
    """Writes the figures of a report into the model card; returns the exit code."""
    try:
        rows = json.loads(report.read_text(encoding="utf-8"))["figures"]
        card = with_figures(CARD.read_text(encoding="utf-8"), [Figure.read(row) for row in rows])
        save_text(card, CARD)
    except (OSError, ValueError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    print(f"written: {CARD}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """`python -m bench.quality …`; returns the exit code."""
    total = sum(COUNTS.values())
    parser = argparse.ArgumentParser("python -m bench.quality", description=__doc__)
    parser.add_argument("--model", default="mini", help="as in reifusion generate (%(default)s)")
    parser.add_argument("--prompts", type=int, default=total, help="50 to %(default)s")
    parser.add_argument("--sampler", help="as in reifusion generate (the model's)")
    parser.add_argument("--steps", type=int, help="as in reifusion generate (the model's)")
    parser.add_argument("--cfg", type=float, help="as in reifusion generate (the model's)")
    parser.add_argument(
        "--out", type=Path, help=f"folder of the report (bench; with fewer than {total} prompts, none)"
    )
    parser.add_argument("--card", action="store_true", help="only copy the last report into the model card")
    given = parser.parse_args(arguments)
    if not 50 <= given.prompts <= total:
        parser.error(f"--prompts must be from 50 to {total}, not {given.prompts}")
    out = given.out or (Path("bench") if given.prompts == total else None)
    if given.card:
        return write_card((given.out or Path("bench")) / "quality.json")
    try:
        pipe = load(given.model)
        asked = Request("a cat", sampler=given.sampler, steps=given.steps, cfg=given.cfg)
        fitted = asked.for_model(pipe.config)
        settings = {name: getattr(fitted, name) for name in ("sampler", "steps", "cfg")}
    except ValueError as error:
        parser.error(str(error))
    try:
        report = evaluate(pipe, settings, given.prompts, out and out / "quality-sheets")
        report["figures"] += [asdict(figure) | {"met": figure.met} for figure in weight(given.model)]
        print(table([Figure.read(row) for row in report["figures"]]))
        if out is not None:
            save_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", out / "quality.json")
            print(f"\nwritten: {out / 'quality.json'}, and what was drawn in {out / 'quality-sheets'}")
    except (DataError, TrainingError, FloatingPointError, OSError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quality: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
