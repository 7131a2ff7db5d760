"""`reifusion train …`, or `python -m reifusion.train …`, or `accelerate launch -m reifusion.train …`."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import warnings
from collections.abc import Container, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from ..errors import sentence
from ..threads import wait_briefly

DESCRIPTION = """Trains a VAE, sharpens one, or trains a text-to-image model, a LoRA, a new word or a
ControlNet, as a recipe says; `mini` trains a whole model like the built-in one from nothing, in ten minutes
on a GPU or in a night on two CPU cores, and `tiny` a very small one, in ten minutes on two CPU cores. The
same command resumes a run that was stopped, by Ctrl-C or by a power cut."""

# The recipes of `reifusion train mini` and `tiny`, in order: on a GPU, and on a CPU.
TINY = (("vae", "tiny-vae"), ("text2image", "tiny"))
MINI = {
    "gpu": (("vae", "mini-vae"), ("text2image", "mini")),
    "cpu": (("vae", "mini-laptop-vae"), ("text2image", "mini-laptop")),
}
WHOLE = {"mini": MINI, "tiny": {"gpu": TINY, "cpu": TINY}}
# Of the minutes that they are given; what is left is for writing the model and drawing the last sheet.
SHARES = {"vae": 0.25, "text2image": 0.7}
ALONE = 0.95  # the share of the second, if the model that it starts from has a VAE already


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reifusion train", description=DESCRIPTION)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument(
        "what",
        choices=("vae", "sharpen", "text2image", "lora", "inversion", "control", *WHOLE),
        help="what to train",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--config", metavar="RECIPE", help="a .toml file, or the name of a built-in recipe")
    instead = parser.add_mutually_exclusive_group()  # of training
    instead.add_argument("--keys", action="store_true", help="explain all keys of a recipe")
    instead.add_argument(
        "--dry-run", action="store_true", help="show parameters, memory and time; no training"
    )
    instead.add_argument(
        "--overfit-one", action="store_true", help="check that the model can learn a single batch"
    )
    instead.add_argument("--check-gradients", action="store_true", help="compare with finite differences")
    instead.add_argument("--plot", action="store_true", help="draw the loss so far over the expected band")
    parser.add_argument("--minutes", type=float, metavar="N", help="train for this time, all in all")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    return parser


def _refuse(message: str) -> NoReturn:
    print(f"reifusion: {message}; `reifusion train --help` says how", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the input was wrong, 130 stopped."""
    wait_briefly()
    given = parser().parse_intermixed_args(arguments)
    try:
        return _train(given)
    except ModuleNotFoundError as error:
        print(
            f"reifusion: training needs the package {error.name}: pip install 'reifusion[train]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        resumes = "" if _only_looks(given) else "; the same command resumes from here"
        print(f"reifusion: stopped{resumes}", file=sys.stderr)
        return 130


def _train(given: argparse.Namespace) -> int:
    import torch

    from .checkpoint import TrainingError
    from .images import DataError

    if given.threads is not None and given.threads < 1:
        print("reifusion: --threads must be at least 1", file=sys.stderr)
        return 2
    if given.threads:
        torch.set_num_threads(given.threads)
    warnings.showwarning = lambda message, *_: print(f"reifusion: {message}", file=sys.stderr)
    threading.excepthook = _of_thread
    try:
        for text in _follow(given):
            print(text, flush=True)
        return 0
    except ValueError as error:  # a wrong model, recipe or setting
        print(f"reifusion: {error}", file=sys.stderr)
        return 2
    except (DataError, TrainingError, OSError) as error:
        print(f"reifusion: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) or os.environ.get("REIFUSION_DEBUG") == "1":
            raise
        print(f"reifusion: {sentence(error, 'batch or size')}", file=sys.stderr)
        return 1


def _of_thread(it: threading.ExceptHookArgs) -> None:
    """Shows the error of a thread; but TensorBoard's hands those of a full disk over to the loop."""
    if not issubclass(it.exc_type, OSError) or os.environ.get("REIFUSION_DEBUG") == "1":
        threading.__excepthook__(it)


def _follow(given: argparse.Namespace) -> Any:
    """Does what was asked for; yields the lines to print."""
    from . import recipe as recipes

    whole = given.what in WHOLE
    stages = _stages(given.what) if whole else ((given.what, given.config or ""),)
    if whole and given.config:
        names = " and ".join(name for _, name in stages)
        raise recipes.RecipeError(
            f"{given.what} is the recipes {names}, one after the other; give no --config"
        )
    if given.minutes is not None and not 0 < given.minutes < float("inf"):
        raise recipes.RecipeError(f"--minutes must be above 0, not {given.minutes:g}")
    start = _value("start", given.overrides) if whole else ""
    for what, name in stages:
        if given.keys:
            yield recipes.described(what)
            continue
        if start and what == "vae":
            yield f"the VAE is that of {start}"
            continue
        overrides = given.overrides
        if given.minutes is not None:
            share = (ALONE if start else SHARES[what]) if whole else 1.0
            overrides = [*overrides, f"minutes={share * given.minutes!r}"]
        if whole:
            known = {each: recipes.keys(each) for each, _ in stages}
            overrides = _of_stage(stages, what, overrides, known)
        recipe = recipes.read(what, recipes.find(name) if name else None, overrides)
        if whole and what == "vae" and Path(recipe.out).exists():
            yield f"the VAE is already in {recipe.out}"
            continue
        with _ahead(given, stages) if what == "vae" else nullcontext():
            yield from _stage(recipe, given)


def _value(key: str, overrides: list[str]) -> str:
    """Returns the last value of a key among overrides; "" if there is none."""
    pairs = [override.partition("=") for override in overrides]
    return next((value.strip() for name, _, value in reversed(pairs) if name.strip() == key), "")


def _stages(model: str) -> tuple[tuple[str, str], ...]:
    """Returns the recipes of `train mini` or `train tiny` that suit this machine."""
    from .loop import processes

    return WHOLE[model]["cpu" if processes().device.type == "cpu" else "gpu"]


def _of_stage(
    stages: tuple[tuple[str, str], ...],
    what: str,
    overrides: list[str],
    known: Mapping[str, Container[str]],
) -> list[str]:
    """Returns the overrides of `train mini` or `train tiny` for one of its recipes: those that it knows.

    The last recipe is also given those that none knows, and refuses them. `out` is the file of the last, and
    each recipe has a folder of its own in `folder`. known: the keys of each recipe.
    """
    last = what == "text2image"
    top, start = _value("folder", overrides), _value("start", overrides)
    mine = ["vae="] if last and start else []  # that of the model
    for override in overrides:
        key = override.partition("=")[0].strip()
        unknown = not any(key in keys for keys in known.values())
        if (key in known[what] or (last and unknown)) and (last or key != "out"):
            mine.append(override)
    if not top:
        return mine
    names = dict(stages)
    vae = f"{top}/{names['vae']}/vae.safetensors"
    kind = names["text2image"].partition("-")[0]  # mini or tiny
    files = {
        "vae": [f"out={vae}"],
        "text2image": [f"vae={vae}", f"out={top}/{names['text2image']}/{kind}.safetensors"],
    }
    mine = [override for override in mine if override.partition("=")[0].strip() != "folder"]
    return [*files[what], *mine, f"folder={top}/{names[what]}"]


def _ahead(given: argparse.Namespace, stages: tuple[tuple[str, str], ...]) -> Any:
    """Returns what to do beside the training of the mini's VAE: on a GPU, to compile the U-Net's steps."""
    name = dict(stages).get("text2image")
    if (
        name is None
        or _only_looks(given)
        or "compile=false" in given.overrides
        or stages in (MINI["cpu"], TINY)
    ):
        return nullcontext()
    from . import recipe as recipes
    from .warm import warming

    known = recipes.keys("text2image")
    here = ("folder", "out", "data")  # nothing is read or written
    overrides = [o for o in given.overrides if (k := o.partition("=")[0].strip()) in known and k not in here]
    return warming([*overrides, "vae="], name)


def _only_looks(given: argparse.Namespace) -> bool:
    """True for what is asked for instead of training."""
    return bool(given.dry_run or given.overfit_one or given.check_gradients or given.plot)


def _stage(recipe: Any, given: argparse.Namespace) -> Any:
    """Follows, checks or plots a single recipe; yields the line to print."""
    if given.plot:
        from .plot import plot

        out = Path(recipe.folder) / "training.png"
        plot(Path(recipe.folder), recipe.expected, out)
        yield f"the curve is in {out}"
        yield from _verdict(Path(recipe.folder))
        return
    from . import checks, run

    if given.dry_run:
        from .price import dry_run

        second = given.what in WHOLE and recipe.train == "text2image"
        yield f"{'training':14} {recipe.train}, into {recipe.folder}"
        yield dry_run(recipe, before_its_vae=second and not Path(recipe.vae).exists())
    elif given.overfit_one:
        yield checks.overfit_one(recipe)
    elif given.check_gradients:
        yield checks.check_gradients(recipe)
    else:
        out = run.run(recipe)
        yield from _verdict(Path(recipe.folder))
        yield f"done: {out}"


def _verdict(folder: Path) -> list[str]:
    """Says whether a run overfits, if pictures were held out."""
    from .plot import losses, verdict

    if not (folder / "training.jsonl").exists():
        return []
    _, why = verdict(*(losses(folder, name) for name in ("held_out", "seen")))
    return [why] if why else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
