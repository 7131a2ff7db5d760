"""Measures how good a model is: it draws 500 prompts, and a judge and the pixels check the pictures.

`python -m bench.quality` prints the table and writes bench/quality.json and, as evidence, sheets of pictures
into bench/quality-sheets/. Every test is also applied to real pictures of the same prompts, sent through the
model's own VAE: their results are the most that a model can reach here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from reifusion.api import load
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.train.images import DataError
from reifusion.train.loop import TrainingError
from reifusion.train.mini.scenes import Scene, Sprites, scene_sheet
from reifusion.train.mini.sprites import LOOKS, default_cache, held_out_sprites, training_sprites

from . import pixels
from .estimates import kid, kid_interval, mean, nearest, too_near, wilson
from .judge import Judge, all_pictures, choices, fingerprint, get_judge, retrieved, through_vae
from .pixels import on_white
from .prompts import COUNTS, Prompt, make_prompts
from .unseen import unseen_pictures

CARD = Path(__file__).parents[1] / "reifusion" / "data" / "MODEL_CARD.md"
BATCH = 20  # pictures drawn at a time
SMALL = 0.4  # extent: "small" is 0.33 in training, and the next size 0.44
GOOD_JUDGE = 0.95  # the share of unseen drawings whose subject the judge has to find


@dataclass(frozen=True)
class Row:
    """A line of the table: the share of the pictures of these kinds in which all `needs` are right."""

    name: str
    kinds: tuple[str, ...]  # of prompts
    needs: tuple[str, ...]  # keys of `verdicts`
    target: float | None = None


PLACED = ("left or right", "small", "two")
ROWS = (
    Row("subject, among 20", ("plain", "style"), ("subject",), 0.90),
    Row("subject, in a style held out", ("style held out",), ("subject",), 0.60),
    Row("style, among the three looks of the subject", ("style",), ("look",), 0.90),
    Row("  and among its four drawings", ("style",), ("style",)),
    Row("style, held out with this subject", ("style held out",), ("look",)),
    Row("background colour", ("background",), ("background",), 0.95),
    Row("  and subject", ("background",), ("background", "subject")),
    Row("dye and subject", ("dye",), ("dye", "subject"), 0.80),
    Row("  dye alone", ("dye",), ("dye",)),
    Row("dye, held out with this subject, and subject", ("dye held out",), ("dye", "subject"), 0.60),
    Row("  dye alone", ("dye held out",), ("dye",)),
    Row("left, right, small, two: place and subject", PLACED, ("place", "subject"), 0.70),
    Row("  left or right: place alone", PLACED[:1], ("place",)),
    Row("  left or right: and subject", PLACED[:1], ("place", "subject")),
    Row("  small: size alone", PLACED[1:2], ("place",)),
    Row("  small: and subject", PLACED[1:2], ("place", "subject")),
    Row("  two: both subjects, each at its side", PLACED[2:], ("place", "subject")),
)
UNITS = {"share": (100, 1, " %"), "dB": (1, 2, " dB"), "s": (1, 2, " s"), "×10⁻³": (1000, 1, "")}


@dataclass(frozen=True)
class Figure:
    """A reported number with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    of: int  # the number of pictures
    real: float | None = None  # the same number for real pictures, through the VAE
    target: float | None = None  # the least value that is good enough; for seconds, the greatest
    unit: str = "share"  # one of UNITS

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.unit == "s" else self.value >= self.target

    @classmethod
    def read(cls, row: dict[str, Any]) -> Figure:
        """Reads a figure from a line of the report."""
        return cls(**{name: value for name, value in row.items() if name != "met"})

    def texts(self) -> tuple[str, ...]:
        """Returns the cells of a table: name, value, interval, pictures, real, target, and if it is met."""
        scale, digits, unit = UNITS[self.unit]

        def text(x: float | None) -> str:
            return "" if x is None else f"{scale * x:.{digits}f}"

        sign = "≤" if self.unit == "s" else "≥"
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
    """Draws the model's pictures, (H, W, 3) uint8, each from its prompt's own seed.

    They are kept in the folder, and existing pictures are not drawn again.
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
                    for prompt, picture in zip(batch, drawn, strict=True):  # type: ignore[arg-type]
                        save_picture(picture, path(prompt))
                bar.update(len(batch))
    return [np.asarray(Image.open(path(prompt))) for prompt in prompts]


def verdicts(
    images: Sequence[np.ndarray], prompts: Sequence[Prompt], judge: Judge, drawings: Sprites
) -> tuple[list[dict[str, bool]], Tensor]:
    """Returns what is right in every picture (subject, style, background, dye, place), and features (N, d).

    drawings: the real drawings, including those held out.
    """
    seen = judge.see(images)
    two = [i for i, prompt in enumerate(prompts) if prompt.kind == "two"]
    halves = [half for i in two for half in pixels.halves(images[i])]
    sides = judge.see(halves).subjects if two else torch.empty(0)  # left, right, left, right, …
    result = []
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        tags = prompt.scene.tags
        right = [judge.subjects.index(subject) for subject in tags["subjects"]]
        among = choices(np.random.default_rng([1, prompt.seed]), len(judge.subjects), right)
        scores = seen.subjects[i : i + 1]
        if prompt.kind == "two":  # the first in the tags is on the left
            scores = sides[2 * two.index(i) :][:2]
        said = {"subject": all(retrieved(s, r, among) for s, r in zip(scores, right, strict=True))}
        if prompt.kind.startswith("style"):
            style = style_name(image, tags["subjects"][0], drawings)
            said["style"] = style == tags["style"]
            said["look"] = LOOKS[style] == LOOKS[tags["style"]]
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


def style_name(image: np.ndarray, subject: str, drawings: Sprites) -> str:
    """Returns the style of the subject's drawing that is nearest to the picture, mirrored or not.

    A network cannot tell: a style shows in many drawings, and little of it in a single picture.
    """
    of = drawings.index[subject]
    theirs = thumbnails([on_white(drawings.pixels[place]) for place in of.values()])
    away = torch.cdist(thumbnails([image, image[:, ::-1]]), theirs)  # (2, styles)
    return list(of)[int(away.min(0).values.argmin())]


# ---- the figures ------------------------------------------------------------------------------------------


def examined(judge: Judge) -> list[Figure]:
    """Returns figures for the judge itself, which come before its verdicts on the model.

    Three styles come from the same artist, so the judge had seen two similar drawings for each of theirs, but
    none for a cartoon.
    """

    def of(name: str, styles: Iterable[str], target: float | None = None) -> Figure:
        right, count = np.sum([judge.unseen[style] for style in styles], axis=0).tolist()
        return share(name, right, count, target=target)

    by_the_same = [style for style in judge.unseen if style != "cartoon"]
    return [
        of("the judge itself: drawings it had not seen", judge.unseen, GOOD_JUDGE),
        of("  3d, flat and glossy ones", by_the_same),
        of("  cartoons, by another hand", ["cartoon"]),
    ]


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


def distance(prompts: Sequence[Prompt], drawn: Tensor, real: Tensor, held_out: Tensor) -> Figure:
    """Returns the KID between the model's pictures of training drawings and the held-out drawings.

    Only the three styles with held-out drawings count; all are features (N, d). `real` is the floor: the
    training drawings themselves, through the VAE.
    """
    mine = [i for i, p in enumerate(prompts) if p.kind == "style" and p.scene.tags["style"] != "3d"]
    value, floor = kid(drawn[mine], held_out), kid(real[mine], held_out)
    low, high = kid_interval(drawn[mine], held_out)
    return Figure("KID to held-out pictures, ×10³", value, low, high, len(mine), floor, unit="×10⁻³")


def memory(
    prompts: Sequence[Prompt],
    images: Sequence[np.ndarray],
    rebuilt: Sequence[np.ndarray],
    folder: Path | None,
) -> list[Figure]:
    """Returns two shares of pictures that are too near to a training picture, pixel by pixel.

    The first is for drawings on which the model was trained, so `real` is a copy of the drawing. The second
    is for held-out drawings: there `real` says how often other drawings are as near without being copies. 24
    pictures and their nearest training pictures go into the folder, if there is one.
    """
    sprites, records = training_sprites()
    training = [on_white(sprite) for sprite in sprites]
    theirs, names = thumbnails(training), [picture.subject for picture in records]
    figures = []
    for kinds, name in ((("plain", "style"), "too near"), (("style held out",), "too near, held out")):
        chosen = [i for i, prompt in enumerate(prompts) if prompt.kind in kinds]
        subjects = [prompts[i].scene.tags["subjects"][0] for i in chosen]
        count, best = (
            too_near(thumbnails([each[i] for i in chosen]), subjects, theirs, names)
            for each in (images, rebuilt)
        )
        figures.append(share(f"{name} to a training picture", count, len(chosen), best / len(chosen)))
    if folder is not None:
        asked = [i for i, prompt in enumerate(prompts) if prompt.kind in ("plain", "style")]
        tiles = []
        for i in asked[:: -(-len(asked) // 24)]:  # 24 of them, evenly
            place = int(nearest(thumbnails([images[i]]), theirs)[1])
            tiles.append(Scene(images[i], prompts[i].text, {}))
            tiles.append(Scene(training[place], f"nearest: {records[place].style} {names[place]}", {}))
        save_picture(scene_sheet(tiles), folder / "nearest.png")
    return figures


def thumbnails(images: Sequence[np.ndarray]) -> Tensor:
    """(N, 3·32·32) in [0, 1]"""
    small = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in images]
    return torch.from_numpy(np.stack(small)).float().flatten(1) / 255


def psnr(
    name: str, pipe: StableDiffusion, images: Sequence[np.ndarray], target: float | None = None
) -> Figure:
    """Returns how well pictures (H, W, 3) uint8 come back from the VAE."""
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
    return Figure("seconds for one picture", times[2], times[0], times[-1], 5, target=3.0, unit="s")


# ---- the evaluation ---------------------------------------------------------------------------------------


def evaluate(
    pipe: StableDiffusion, settings: dict[str, Any], count: int, evidence: Path | None
) -> dict[str, Any]:
    """Returns the whole report: figures, settings and hashes.

    settings: arguments of `generate`. count: the number of prompts. evidence: a folder for sheets, or None.
    """
    began = time.time()
    judge = get_judge()
    model = {"name": pipe.config.name, "sha256": fingerprint(*pipe.models.values()), "dtype": str(pipe.dtype)}
    id = hashlib.sha256(json.dumps([model, settings]).encode()).hexdigest()[:8]
    quick = speed(pipe, settings)
    held_out = [on_white(sprite) for sprite in held_out_sprites()[0]]
    prompts = make_prompts(counts=portion(count))
    images = draw(pipe, prompts, settings, default_cache().parent / f"quality-{id}")
    rebuilt = through_vae(pipe, [prompt.scene.image for prompt in prompts])
    drawings = Sprites(*all_pictures())
    drawn, features = verdicts(images, prompts, judge, drawings)
    real, real_features = verdicts(rebuilt, prompts, judge, drawings)
    figures = [
        *examined(judge),
        *score(prompts, drawn, real),
        distance(prompts, features, real_features, judge.see(held_out).features),
        *memory(prompts, images, rebuilt, evidence),
        psnr("VAE, pictures held out from the U-Net", pipe, held_out, 30.0),
        psnr("VAE, pictures that no training saw", pipe, unseen_pictures()),
        quick,
    ]
    if evidence is not None:
        for kind in COUNTS:
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind == kind][:32]
            marked = [_marked(images[i], prompts[i].text, drawn[i]) for i in chosen]
            save_picture(scene_sheet(marked), evidence / f"{kind.replace(' ', '-')}.png")
    return {
        "model": model,
        "judge": {"id": judge.id, "sha256": fingerprint(judge.model), "vae": judge.vae},
        "settings": settings
        | {"prompts": count, "threads": torch.get_num_threads(), "torch": torch.__version__},
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        "seconds": round(time.time() - began),
    }


def portion(count: int) -> dict[str, int]:
    """Returns the counts of `count` prompts in all, in the proportions of `COUNTS`."""
    ends = np.cumsum([0, *COUNTS.values()]) * count // sum(COUNTS.values())
    return dict(zip(COUNTS, np.diff(ends).tolist(), strict=True))


def _marked(image: np.ndarray, text: str, said: dict[str, bool]) -> Scene:
    wrong = ", ".join(name for name, right in said.items() if not right)
    return Scene(image, f"{text} (wrong: {wrong})" if wrong else text, {})


# ---- on disk ----------------------------------------------------------------------------------------------


def save_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    picture.save(temporary)
    os.replace(temporary, path)


def save_text(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
