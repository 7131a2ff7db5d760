"""One switch, one row, three seeds: what parts of a training are worth, on the task of `reifusion train tiny`.

    python -m bench.ablations              # goes on where it stopped; bench/ablations.json has every finished run
    python -m bench.ablations epsilon flow # only these rows

The VAE comes first, and one more for each row that changes it. Each run then trains a small model for the
same number of steps on the same latents, and draws the same prompts from the same seeds, whatever its network
predicts. A judge that has learned from true drawings, and from no model's, says what is to be seen. So the measure knows nothing of losses, which cannot be compared between rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reifusion.files import write_json
from reifusion.model.pictures import to_tensor
from reifusion.model.pipeline import StableDiffusion
from reifusion.train import shapes
from reifusion.train.material import captioned_latents
from reifusion.train.recipe import Recipe, find, read
from reifusion.train.run import run
from reifusion.train.sizes import SIZES, model_config
from reifusion.train.text2image import train_text2image
from reifusion.train.vae_file import load_vae

OUT = Path(__file__).parent / "ablations.json"
SEEDS = (0, 1, 2)
STEPS = 300
# A narrower tiny, against no clock: a run is a matter of minutes.
SMALL = (
    "channels=[32, 64]",
    f"steps={STEPS}",
    "minutes=none",
    "batch=32",
    "mixed_precision=no",  # so narrow a network is faster in float32
    "checkpoint_minutes=60",
)
# "" is the recipe as it is; every other row changes what its name says.
ROWS: dict[str, tuple[str, ...]] = {
    "": (),
    "AdamW": ("muon=false",),
    "epsilon": ("prediction_type=epsilon",),
    "flow": ("prediction_type=flow",),
    "epsilon, min-SNR": ("prediction_type=epsilon", "max_snr=5"),
    "no average": ("ema=0",),
    "all times alike": ("timestep_power=1",),
    "no captions dropped": ("caption_dropout=0",),
    "min-SNR": ("max_snr=5",),
    "AdamW, a third of the rate": ("muon=false", "lr=1e-3"),
    "VAE without KL": (),
    "VAE with 100 times the KL": (),
}
VAE_STEPS = 560
# The rows that have a VAE of their own, and what it changes; its latents always have variance 1.
VAES: dict[str, tuple[str, ...]] = {
    "VAE without KL": ("kl_weight=0",),
    "VAE with 100 times the KL": ("kl_weight=0.03",),
}
DRAWING: dict[str, Any] = {"steps": 16, "cfg": 3.0, "progress": False}
REAL = 1024  # true drawings that the drawn ones are compared with


class Judge(nn.Module):
    """Looks at a picture of 32×32 and says which thing it shows, in which colour, and on which side."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96)
        layers = [
            nn.Sequential(
                nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1), nn.SiLU()
            )
            for a, b in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*layers, nn.Flatten())  # (B, 96·4·4)
        self.features = nn.Linear(96 * 16, 64)
        self.heads = nn.ModuleList(nn.Linear(64, n) for n in (len(shapes.SUBJECTS), len(shapes.COLOURS), 2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, 3, 32, 32) in [−1, 1] -> what it sees, (B, 64), and the logits of each of its answers."""
        seen = F.silu(self.features(self.body(x)))
        return seen, [head(seen) for head in self.heads]


class Asked(NamedTuple):
    """A prompt, and what a picture of it has to show."""

    prompt: str
    answers: tuple[int, int, int]
    known: bool  # False: no drawing shows this thing in this colour


def asked() -> list[Asked]:
    """Every thing in every colour, on the left and on the right."""
    found = []
    for s, subject in enumerate(shapes.SUBJECTS):
        for c, colour in enumerate(shapes.COLOURS):
            for p, place in enumerate((" on the left", " on the right")):
                article = "an" if colour == "orange" else "a"
                prompt = f"{article} {colour} {subject}{place}"
                found.append(Asked(prompt, (s, c, p), colour != shapes.UNSEEN[subject]))
    return found


def true_drawings(draw: random.Random, count: int, anywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Draws things in any colour on either side, by day or night: (count, 3, 32, 32), their answers (count, 3).

    anywhere: True for every third of them where no words say a place; the answer to the side is then −100.
    """
    pictures, answers = [], []
    for _ in range(count):
        s, c, p = draw.randrange(8), draw.randrange(8), draw.randrange(2)
        if anywhere and draw.random() < 1 / 3:
            p = -100  # what cross_entropy leaves out
        place = (" on the left", " on the right")[p] if p >= 0 else ""
        subject, colour = list(shapes.SUBJECTS)[s], list(shapes.COLOURS)[c]
        shown = shapes.Scene(subject, colour, place, draw.random() < 0.25, "")
        pictures.append(to_tensor(shapes.picture(shown, draw)))
        answers.append((s, c, p))
    return torch.cat(pictures), torch.tensor(answers)


def trained_judge(steps: int = 600) -> Judge:
    """Trains the judge on true drawings."""
    torch.manual_seed(0)
    judge, draw = Judge(), random.Random(0)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pictures, answers = true_drawings(draw, 9_000, anywhere=True)
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (64,))
        x = pictures[chosen] + 0.1 * torch.randn(64, 3, 1, 1)  # of no exact colour
        x = x + 0.05 * torch.randn_like(x)
        logits = judge(x)[1]
        loss = sum(
            (F.cross_entropy(each, answers[chosen, k]) for k, each in enumerate(logits)), x.new_zeros(())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return judge


def asked_for() -> Tensor:
    """True drawings of what the prompts ask for, eight of each, by day: (1024, 3, 32, 32)."""
    found = []
    for k, question in enumerate(asked() * (REAL // len(asked()))):
        s, c, p = question.answers
        place = (" on the left", " on the right")[p]
        shown = shapes.Scene(list(shapes.SUBJECTS)[s], list(shapes.COLOURS)[c], place, False, question.prompt)
        found.append(to_tensor(shapes.picture(shown, random.Random(k))))
    return torch.cat(found)


def known_judge(file: Path) -> tuple[Judge, float]:
    """Returns the trained judge, kept in a file for when this goes on, and how often it is right."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained_judge().state_dict(), file)
    judge = Judge()
    judge.load_state_dict(load_file(file))
    return judge.eval(), right(judge, *true_drawings(random.Random(1), REAL)).mean().item()


def trained_vae(row: str, work: Path) -> Path:
    """Returns the file of the row's VAE; trains it if there is none."""
    folder = work / f"vae {row if row in VAES else ''}".strip()
    keys = ("minutes=none", f"steps={VAE_STEPS}", "checkpoint_minutes=60", *VAES.get(row, ()))
    file = folder / "vae.safetensors"
    if not file.exists():
        run(read("vae", find("tiny-vae"), [*keys, f"folder={folder}", f"out={file}"]))
    return file


@torch.no_grad()
def best(judge: Judge, vae_file: Path) -> float:
    """Returns how often the judge is right about true drawings that have gone through the VAE: no U-Net beats it."""
    vae = load_vae(str(vae_file), SIZES["tiny"])
    pictures, answers = true_drawings(random.Random(1), REAL)
    seen = torch.cat([vae.decoder(vae.encoder(x)).clamp(-1, 1) for x in pictures.split(64)])
    return right(judge, seen, answers).mean().item()


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor, answers: Tensor) -> Tensor:
    """1 for each answer about a picture that is right, and 0 for one that is wrong: (B, 3)"""
    given = torch.stack([logits.argmax(1) for logits in judge(pictures)[1]], dim=1)
    return (given == answers).float()


def right(judge: Judge, pictures: Tensor, answers: Tensor) -> Tensor:
    """1 for each picture of which all answers are right, and otherwise 0: (B,)"""
    return verdicts(judge, pictures, answers).prod(1)


@torch.no_grad()
def distance(judge: nn.Module, drawn: Tensor, real: Tensor) -> float:
    """Returns the distance of two sets of pictures, √ of Fréchet's, by what the judge sees of them.

    Source: Heusel et al. 2017, Eq. 6 (FID), with a judge of 64 features in place of Inception's 2,048.
    """
    (m, c), (n, d) = ((x.mean(0), torch.cov(x.T)) for x in (judge(p)[0].double() for p in (drawn, real)))
    root = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return max(0.0, ((m - n).square().sum() + c.trace() + d.trace() - 2 * root).item()) ** 0.5


def of_row(name: str, seed: int, vae: Path, work: Path) -> Recipe:
    """Returns the recipe of a run."""
    here = [f"folder={work / (name or 'as it is')}-{seed}", f"vae={vae}", f"seed={seed}"]
    return read("text2image", find("tiny"), [*SMALL, *ROWS[name], *here])


def measured(
    name: str, seed: int, vae_file: Path, work: Path, judge: Judge, real: Tensor
) -> dict[str, float]:
    """Trains a run and draws with it; returns its figures."""
    recipe = of_row(name, seed, vae_file, work)
    config, folder = model_config(recipe), Path(recipe.folder)
    vae = load_vae(str(vae_file), config)
    together = replace(recipe, folder=str(vae_file.parent / "data"))  # encoded once for all runs
    data, tokenizer = captioned_latents(together, shapes.shapes(), config, vae, None)
    begun, empty = time.process_time(), torch.tensor(tokenizer.encode(""))
    model = train_text2image(data, empty, config, recipe.training, folder)
    took = time.process_time() - begun
    networks = {
        "encoder": vae.encoder,
        "decoder": vae.decoder,
        "clip": model.clip,
        "diffusion": model.diffusion,
    }
    pipe = StableDiffusion(config, tokenizer, networks)
    shutil.rmtree(folder)
    return figures(pipe, judge, real) | {"cpu_seconds": took}


def figures(pipe: StableDiffusion, judge: Judge, real: Tensor) -> dict[str, float]:
    """Draws every prompt; returns how often the judge finds what was asked for, and the distance from `real`.

    "right": all three answers, of things in colours that drawings show; "unseen": the same of the others.
    """
    # Neither sampler adds noise on the way.
    sampler = "flow" if pipe.config.schedule.prediction_type == "flow" else "ddim"
    questions = asked()
    images: Any = pipe.generate([q.prompt for q in questions], seed=1, sampler=sampler, **DRAWING)
    drawn = torch.cat([to_tensor(image) for image in images])
    good = verdicts(judge, drawn, torch.tensor([q.answers for q in questions]))
    known = torch.tensor([q.known for q in questions])
    thing, colour, side = good[known].mean(0).tolist()
    return {
        "right": good[known].prod(1).mean().item(),
        "thing": thing,
        "colour": colour,
        "side": side,
        "unseen": good[~known].prod(1).mean().item(),
        "distance": distance(judge, drawn, real),
    }


def summary(runs: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Returns the mean and the standard deviation over the seeds of each figure."""
    found = {}
    for figure in next(iter(runs.values())):
        values = [run[figure] for run in runs.values()]
        found[figure] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def verdict(row: dict[str, dict[str, float]], base: dict[str, dict[str, float]], figure: str) -> str:
    """Says whether a row's figure is higher than that of the recipe as it is.

    A difference counts if it is more than twice its own standard error, from the spread of the seeds.
    """
    if min(len(row), len(base)) < len(SEEDS):
        return f"{len(row)} of {len(SEEDS)} seeds"
    (mean, spread), (usual, other) = summary(row)[figure], summary(base)[figure]
    error = ((spread**2 + other**2) / len(SEEDS)) ** 0.5
    if abs(mean - usual) <= 2 * error:
        return "not to be told apart"
    return "higher" if mean > usual else "lower"


def stored() -> dict[str, Any]:
    """Returns what has been measured so far; "rows" has for each row, by seed, the figures of its runs."""
    return json.loads(OUT.read_text("utf-8")) if OUT.exists() else {"steps": STEPS, "rows": {}}


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.ablations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help="names of rows; none: all of them")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"), help="for checkpoints")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(ROWS):
        parser.error(
            f"there is no row {', '.join(sorted(unknown))}; there are {', '.join(filter(None, ROWS))}"
        )
    judge, ceiling = known_judge(given.work / "judge.safetensors")
    real = asked_for()
    for name in given.rows or ROWS:
        for seed in SEEDS:
            if str(seed) in stored()["rows"].get(name, {}):
                continue
            vae = trained_vae(name, given.work)
            found = measured(name, seed, vae, given.work, judge, real) | {"vae": best(judge, vae)}
            report = stored() | {"judge": ceiling}  # read again: other rows may be measured at the same time
            report["rows"].setdefault(name, {})[str(seed)] = found
            write_json(OUT, report)
            print(name or "as it is", seed, found, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
