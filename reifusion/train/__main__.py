"""`reifusion train …`, also as `python -m reifusion.train …` and `accelerate launch -m reifusion.train …`."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = """Trains a VAE, sharpens one, trains a text-to-image model or a LoRA, by a recipe; or with
`mini` all of the built-in model from nothing. A run that was stopped, by Ctrl-C or by a power cut, goes on
with the same command."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("reifusion train", description=DESCRIPTION)
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument(
        "what", choices=("vae", "sharpen", "text2image", "lora", "mini"), help="what to train"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the recipe")
    parser.add_argument(
        "--config", metavar="RECIPE", help="a .toml file, or the name of one that comes along"
    )
    parser.add_argument("--keys", action="store_true", help="list what a recipe can say, and the defaults")
    parser.add_argument("--dry-run", action="store_true", help="parameters, memory and time, and no training")
    parser.add_argument(
        "--overfit-one", action="store_true", help="on one batch the loss must go to 0: does it?"
    )
    parser.add_argument("--check-gradients", action="store_true", help="compare them with finite differences")
    parser.add_argument("--plot", action="store_true", help="draw the loss so far over the expected band")
    parser.add_argument("--threads", type=int, help="of the CPU")
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
        print("reifusion: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _train(given: argparse.Namespace) -> int:
    import torch

    from .checkpoint import TrainingError
    from .data import DataError

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
    except ValueError as error:  # a model, a recipe or a setting that will not do
        print(f"reifusion: {error}", file=sys.stderr)
        return 2
    except (DataError, TrainingError, OSError) as error:
        print(f"reifusion: {error}", file=sys.stderr)
        return 1


def _follow(given: argparse.Namespace) -> Any:
    """Does what was asked for; yields what there is to say."""
    from . import recipe as recipes

    if given.what == "mini":
        stages = [("vae", "mini-vae"), ("sharpen", "mini-sharpen"), ("text2image", "mini")]
        if given.config:
            raise recipes.RecipeError(
                "mini is the recipes mini-vae, mini-sharpen and mini, one after the other; give no --config"
            )
    else:
        stages = [(given.what, given.config or "")]
    for what, name in stages:
        if given.keys:
            yield "\n".join(f"{key:24} {value!r}" for key, value in recipes.keys(what).items())
            continue
        overrides = given.overrides
        if given.what == "mini":  # what only one of them knows is for that one
            overrides = [
                o for o in overrides if o.partition("=")[0] in recipes.keys(what) or what == "text2image"
            ]
        recipe = recipes.read(what, recipes.find(name) if name else None, overrides)
        if given.what == "mini" and what != "text2image" and Path(recipe.out).exists():
            yield f"the {'VAE' if what == 'vae' else 'sharpened VAE'} is in {recipe.out} already"
            continue
        yield from _stage(recipe, given)


def _stage(recipe: Any, given: argparse.Namespace) -> Any:
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
