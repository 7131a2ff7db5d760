"""The experiments of `reifusion explain`, as a table.

Each is a function in `reifusion/explain` that makes one picture, with some of the settings and options of
its own. The functions are imported when they run, as they import PyTorch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import option

if TYPE_CHECKING:
    from ..explain.figures import Exhibit


def _picture(path: str) -> Any:
    from ..model.pictures import read_picture

    return read_picture(path)


@dataclass(frozen=True)
class Own:
    """An option that only one experiment has: an argument of the experiment's function."""

    parameter: inspect.Parameter
    read: Callable[[Any], Any] = lambda value: value  # from what the command line took
    varies: str = ""  # the setting that the experiment gives these values

    @property
    def name(self) -> str:
        return self.parameter.name


@dataclass(frozen=True)
class Experiment:
    """A question to a model, which one picture answers."""

    function: str  # "module.name" in reifusion/explain: takes a pipe, a request and the options of its own
    about: str  # one line for the list of experiments
    file: str  # the name of its picture, with {seed}, {steps}, {subject} and its own options
    own: tuple[Own, ...] = ()
    settings: str = "prompt seed steps cfg sampler size"
    subject: Callable[[dict[str, Any]], str] = lambda values: values["prompt"]
    check: Callable[[dict[str, Any]], None] = lambda own: None  # ValueError for options that do not agree

    def __call__(self, *given: Any, **own: Any) -> Exhibit:
        module, _, name = self.function.partition(".")
        return getattr(import_module(f"reifusion.explain.{module}"), name)(*given, **own)


def numbers(flag: str, kind: type) -> Callable[[str], list[Any]]:
    """Returns a reader of numbers with commas between."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{flag} takes {what} with commas between, not {text!r}") from None

    return read


def pixel(text: str) -> tuple[int, int]:
    """10,20 -> (10, 20)"""
    found = numbers("--pixel", int)(text)
    if len(found) != 2:
        raise ValueError(f"--pixel takes two whole numbers, x,y, not {text!r}")
    return found[0], found[1]


def _names(text: str) -> list[str]:
    return text.split(",")


def _by(text: str) -> str:
    if text not in ("word", "step", "layer", "head", "pixel"):
        raise ValueError(f"--by is word, step, layer, head or pixel, not {text!r}")
    return text


def _pixel_and_by(own: dict[str, Any]) -> None:
    if (own["by"] == "pixel") != (own["pixel"] is not None):
        raise ValueError("--by pixel and --pixel x,y belong together")


STOPS = Own(option("stops", "Pictures on the way, both ends included.", 7, kind=int, min=2))

EXPERIMENTS: dict[str, Experiment] = {
    "words": Experiment(
        "words.words",
        "Where the picture looked at each word; or by step, layer, head, or from a pixel.",
        "words-by-{by}-{subject}-{seed}",
        (
            Own(option("by", "word, step, layer, head, or pixel.", "word"), _by),
            Own(option("word", "Only this one.", shown="the most telling")),
            Own(option("special", "Also show start, end and padding.", False, "--special", kind=bool)),
            Own(option("pixel", "x,y of the place that looks, for --by pixel."), pixel),
        ),
        check=_pixel_and_by,
    ),
    "cfg": Experiment(
        "experiments.cfg",
        "The same noise under weaker and stronger guidance.",
        "cfg-{subject}-{seed}",
        (
            Own(
                option("scales", "Guidance scales, with commas between.", "1,2,4,7.5,12,20"),
                numbers("--scales", float),
                varies="cfg",
            ),
        ),
        settings="prompt seed steps sampler size",
    ),
    "steps": Experiment(
        "experiments.steps",
        "The same noise in few steps and in many.",
        "steps-{subject}-{seed}",
        (
            Own(
                option("counts", "Numbers of steps, with commas between.", "1,2,4,8,16,32,64"),
                numbers("--counts", int),
                varies="steps",
            ),
            Own(option("samplers", "With commas between."), _names, varies="sampler"),
        ),
        settings="prompt seed cfg size",
    ),
    "samplers": Experiment(
        "experiments.samplers",
        "The same noise, every sampler.",
        "samplers-{subject}-{seed}",
        settings="prompt seed steps cfg size",
    ),
    "seeds": Experiment(
        "experiments.seeds",
        "A walk from one noise to another.",
        "seeds-{subject}-{seed}-{to}",
        (Own(option("to", "The seed where the walk ends.", 1, kind=int), varies="seed"), STOPS),
    ),
    "prompts": Experiment(
        "experiments.prompts",
        "A walk from one prompt to another.",
        "prompts-{subject}-{seed}",
        (Own(option("to", "The prompt at the other end.", argument=True, required=True)), STOPS),
        subject=lambda values: f"{values['prompt']} to {values['to']}",
    ),
    "swap": Experiment(
        "keys.swap",
        "Swaps the keys of two words, and their things change places.",
        "swap-{subject}-{seed}",
        (
            Own(
                option("words", "The two, with a comma between.", None, "--words", shown="the most telling"),
                _names,
            ),
            Own(option("seeds", "How many seeds.", 3, kind=int, min=1)),
        ),
    ),
    "ablate": Experiment("ablate.ablate", "Without a word, a layer, a head.", "ablate-{subject}-{seed}"),
    "latents": Experiment(
        "latents.latents", "The latents' channels, and what each is for.", "latents-{subject}-{seed}"
    ),
    "vae": Experiment(
        "latents.vae",
        "A picture, there and back through the VAE.",
        "vae-{subject}",
        (
            Own(
                option("picture", "Any picture.", shown="a test card", argument=True, metavar="FILE"),
                _picture,
            ),
        ),
        settings="",
        subject=lambda values: "test card" if values["picture"] is None else Path(values["picture"]).stem,
    ),
    "schedule": Experiment(
        "schedule.schedule",
        "How much noise when, and when samplers look.",
        "schedule-{steps}",
        settings="steps seed",
    ),
    "tokens": Experiment(
        "tokens.of_prompt", "How a prompt is cut into tokens.", "tokens-{subject}", settings="prompt"
    ),
    "halves": Experiment(
        "halves.halves",
        "Do words find their things? Measured on prompts with a left and a right.",
        "halves-{num}-{seed}",
        (Own(option("num", "How many pictures.", 12, kind=int, min=1)),),
        settings="seed steps cfg sampler",
    ),
    "bugs": Experiment(
        "bugs.gallery",
        "Famous mistakes, switched on.",
        "bugs-{subject}-{seed}",
        (Own(option("names", "Names of some, with commas.", None, "--only", shown="all"), _names),),
        settings="prompt seed steps cfg",
    ),
}
