"""`reifusion train …`, or `python -m reifusion.train …`, or `accelerate launch -m reifusion.train …`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = """Trains a VAE, sharpens one, or trains a text-to-image model or a LoRA, as a recipe says;
`mini` trains the whole built-in model from nothing. The same command resumes a run that was stopped, by
Ctrl-C or by a power cut."""

# The recipes of `reifusion train mini`, in order.
MINI = (("vae", "mini-vae"), ("sharpen", "mini-sharpen"), ("text2image", "mini"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reifusion train", description=DESCRIPTION)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument(
        "what", choices=("vae", "sharpen", "text2image", "lora", "mini"), help="what to train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    parser.add_argument("--config", metavar="RECIPE", help="a .toml file, or the name of a built-in recipe")
    parser.add_argument("--keys", action="store_true", help="explain all keys of a recipe")
    parser.add_argument(
        "--dry-run", action="store_true", help="show parameters, memory and time; no training"
    )
    parser.add_argument(
        "--overfit-one", action="store_true", help="check that the model can learn a single batch"
    )
    parser.add_argument("--check-gradients", action="store_true", help="compare with finite differences")
    parser.add_argument("--plot", action="store_true", help="draw the loss so far over the expected band")
    parser.add_argument("--threads", type=int, help="number of CPU threads")
    return parser


def _refuse(message: str) -> NoReturn:
    print(f"reifusion: {message}; `reifusion train --help` says how", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 1 the work failed, 2 the input was wrong, 130 stopped."""
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
        print("reifusion: stopped; the same command resumes from here", file=sys.stderr)
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


def _follow(given: argparse.Namespace) -> Any:
    """Does what was asked for; yields the lines to print."""
    from . import recipe as recipes

    if given.what == "mini" and given.config:
        raise recipes.RecipeError(
            "mini is the recipes mini-vae, mini-sharpen and mini, one after the other; give no --config"
        )
    for what, name in MINI if given.what == "mini" else [(given.what, given.config or "")]:
        if given.keys:
            yield recipes.described(what)
            continue
        overrides = given.overrides
        if given.what == "mini":
            overrides = _of_stage(what, name, overrides, recipes.keys(what))
        recipe = recipes.read(what, recipes.find(name) if name else None, overrides)
        if given.what == "mini" and what != "text2image" and Path(recipe.out).exists():
            yield f"the {'VAE' if what == 'vae' else 'sharpened VAE'} is already in {recipe.out}"
            continue
        yield from _stage(recipe, given)


def _of_stage(what: str, name: str, overrides: list[str], known: Container[str]) -> list[str]:
    """Returns the overrides of `train mini` for one of its recipes.

    `out` is the file of the last, and each recipe has a folder of its own in `folder`.
    """
    last = what == "text2image"
    top = next((o.partition("=")[2] for o in overrides if o.startswith("folder=")), "")
    # The last recipe refuses keys that none has.
    mine = [o for o in overrides if last or (o.partition("=")[0] in known and not o.startswith("out="))]
    if not top:
        return mine
    blurred, sharp = f"{top}/mini-vae/vae.safetensors", f"{top}/mini-sharpen/vae.safetensors"
    files = {
        "vae": [f"out={blurred}"],
        "sharpen": [f"start={blurred}", f"out={sharp}"],
        "text2image": [f"vae={sharp}", f"out={top}/mini/mini.safetensors"],
    }
    return [*files[what], *(o for o in mine if not o.startswith("folder=")), f"folder={top}/{name}"]


def _stage(recipe: Any, given: argparse.Namespace) -> Any:
    """Follows, checks or plots a single recipe; yields the line to print."""
    if given.plot:
        from .plot import plot

        out = Path(recipe.folder) / "training.png"
        plot(Path(recipe.folder), recipe.expected, out)
        yield f"the curve is in {out}"
        return
    from . import checks, run

    if given.dry_run:
        yield checks.dry_run(recipe)
    elif given.overfit_one:
        yield checks.overfit_one(recipe)
    elif given.check_gradients:
        yield checks.check_gradients(recipe)
    else:
        yield f"done: {run.run(recipe)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
