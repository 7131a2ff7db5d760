"""`reifusion explain …`: with a prompt, everything about one picture; with a name, an experiment.

`EXPERIMENTS` is the table of experiments. Each is a function in `reifusion/explain`, which makes one
picture, and what that function needs: some of the settings, and options of its own. The functions are
imported late, as they import PyTorch.
"""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..explain.guide import GUIDE
from ..files import free, whole, writable
from ..settings import Settings, read, read_picture
from .options import option, setting, takes

if TYPE_CHECKING:
    from ..explain.figures import Exhibit
    from ..model.pipeline import StableDiffusion
    from ..model.request import Request

app = typer.Typer(
    add_completion=False,
    help="Shows how a picture comes about.\n\n"
    "With a prompt: everything about one picture, in a folder with a page to begin from. With a name from "
    "below: one picture that answers one question, and what to look for in it. (For a prompt that is such a "
    "name: explain picture NAME.)",
)

Out = Annotated[str, typer.Option(help="The folder to write to.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only where the result is.")]
OUT = "explain"


def main(arguments: list[str]) -> int:
    """Runs `reifusion explain` with these arguments; returns the exit code. Does not catch errors."""
    names = [command.name for command in app.registered_commands]
    if arguments and arguments[0] not in (*names, "--help"):
        arguments = ["picture", *arguments]
    return app(arguments or ["--help"], prog_name="reifusion explain", standalone_mode=False) or 0


# ---- the table --------------------------------------------------------------------------------------------


def _numbers(flag: str, kind: type) -> Callable[[str], list[Any]]:
    """Returns a reader of numbers with commas between."""

    def read_numbers(text: str) -> list[Any]:
        try:
            return [kind(part) for part in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise ValueError(f"{flag} takes {what} with commas between, not {text!r}") from None

    return read_numbers


def _pixel(text: str) -> tuple[int, int]:
    numbers = _numbers("--pixel", int)(text)
    if len(numbers) != 2:
        raise ValueError(f"--pixel takes two whole numbers, x,y, not {text!r}")
    return numbers[0], numbers[1]


def _by(text: str) -> str:
    if text not in ("word", "step", "layer", "head", "pixel"):
        raise ValueError(f"--by is word, step, layer, head or pixel, not {text!r}")
    return text


def _names(text: str) -> list[str]:
    return text.split(",")


@dataclass(frozen=True)
class Own:
    """An option that only one experiment has: an argument of the experiment's function."""

    name: str
    help: str
    default: Any = None
    flags: tuple[str, ...] = ()  # if not those of the name
    kind: type = str
    shown: str | None = None  # the default, in words
    read: Callable[[Any], Any] = lambda value: value  # from what the command line took
    varies: str = ""  # the setting that the experiment gives these values
    typer: dict[str, Any] = field(default_factory=dict)  # what `option` takes besides


@dataclass(frozen=True)
class Experiment:
    function: str  # "module.name" in reifusion/explain: takes a pipe, a request and the options of its own
    about: str  # one line for the list of experiments
    file: str  # the name of its picture; holds settings, options, and the subject
    own: tuple[Own, ...] = ()
    settings: str = "prompt seed steps cfg sampler size"
    subject: Callable[[dict[str, Any]], str] = lambda said: said["prompt"]
    check: Callable[[dict[str, Any]], None] = lambda said: (
        None
    )  # raises ValueError for options that do not agree


def _pixel_and_by(said: dict[str, Any]) -> None:
    if (said["by"] == "pixel") != (said["pixel"] is not None):
        raise ValueError("--by pixel and --pixel x,y belong together")


STOPS = Own("stops", "Pictures on the way, both ends included.", 7, kind=int, typer={"min": 2})

EXPERIMENTS: dict[str, Experiment] = {
    "words": Experiment(
        "words.words",
        "Where the picture looked at each word; or by step, layer, head, or from a pixel.",
        "words-by-{by}-{subject}-{seed}",
        (
            Own("by", "word, step, layer, head, or pixel.", "word", read=_by),
            Own("word", "Only this one.", shown="the most telling"),
            Own("special", "Also show start, end and padding.", False, ("--special",), kind=bool),
            Own("pixel", "x,y of the place that looks, for --by pixel.", read=_pixel),
        ),
        check=_pixel_and_by,
    ),
    "cfg": Experiment(
        "experiments.cfg",
        "The same noise under weaker and stronger guidance.",
        "cfg-{subject}-{seed}",
        (
            Own(
                "scales", "Guidance scales, with commas between.", "1,2,4,7.5,12,20",
                read=_numbers("--scales", float), varies="cfg",
            ),
        ),
        "prompt seed steps sampler size",
    ),
    "steps": Experiment(
        "experiments.steps",
        "The same noise in few steps and in many.",
        "steps-{subject}-{seed}",
        (
            Own(
                "counts", "Numbers of steps, with commas between.", "1,2,4,8,16,32,64",
                read=_numbers("--counts", int), varies="steps",
            ),
            Own("samplers", "With commas between.", read=_names, varies="sampler"),
        ),
        "prompt seed cfg size",
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
        (Own("to", "The seed where the walk ends.", 1, kind=int, varies="seed"), STOPS),
    ),
    "prompts": Experiment(
        "experiments.prompts",
        "A walk from one prompt to another.",
        "prompts-{subject}-{seed}",
        (Own("to", "The prompt at the other end.", typer={"argument": True, "required": True}), STOPS),
        subject=lambda said: f"{said['prompt']} to {said['to']}",
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
                "picture", "Any picture.", shown="a test card", read=read_picture,
                typer={"argument": True, "metavar": "FILE"},
            ),
        ),
        "",
        lambda said: "test card" if said["picture"] is None else Path(said["picture"]).stem,
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
        (Own("num", "How many pictures.", 12, kind=int, typer={"min": 1}),),
        "seed steps cfg sampler",
    ),
    "bugs": Experiment(
        "bugs.gallery",
        "Famous mistakes, switched on.",
        "bugs-{subject}-{seed}",
        (Own("names", "Names of some, with commas.", None, ("--only",), shown="all", read=_names),),
        "prompt seed steps cfg",
    ),
}  # fmt: skip


# ---- the commands -----------------------------------------------------------------------------------------


def _settings(names: str) -> list[inspect.Parameter]:
    """Returns options for these settings and the model. A prompt is required; the seed is 0 by default."""
    own: dict[str, dict[str, Any]] = {"prompt": {"required": True}, "seed": {"default": 0}}
    return [setting(name, **own.get(name, {})) for name in [*names.split(), "model"]]


def _request(given: dict[str, Any], varied: Iterable[tuple[str, Any]] = ()) -> tuple[Settings, Request]:
    """Returns what was asked for. varied: settings, by name, that an experiment is going to change.

    Raises ValueError, in one sentence, for what the model cannot draw, which its file says before it is
    loaded.
    """
    from ..model.model_loader import info

    settings = replace(Settings(prompt="", seed=0), **read(given))
    request, config = settings.request(), info(settings.model).config
    for name, value in varied:
        replace(request, **{name: value}).for_model(config)
    return settings, request.for_model(config)


def _pipe(settings: Settings) -> StableDiffusion:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('explaining needs matplotlib: pip install "reifusion[explain]"')
    return settings.pipe()


@app.command("picture")
@takes(
    *_settings("prompt negative seed steps cfg sampler size"),
    option("pixel", "x,y of a place in the picture, to see what it looks at."),
)
def picture(given: dict[str, Any], out: Out = OUT, quiet: Quiet = False) -> None:
    """Everything about one picture: how it formed, which word made which pixel, what every module did."""
    pixel = given.pop("pixel", None)
    place = None if pixel is None else _pixel(pixel)
    settings, request = _request(given)
    with writable(Path(out)):
        pipe = _pipe(settings)
        from .. import album
        from ..explain.folder import explain

        entry = album.entry(settings, request, pipe)
        target = free(Path(out) / album.file_name(entry.settings).removesuffix(".png"))
        with whole(target) as building:
            building.mkdir()
            explain(pipe, request, building, entry, place)
    print(target / "index.html")
    if not quiet:
        print("\nOpen it in a browser. Beside it are the pictures, and as data all that they were made from.")


@app.command("trace")
@takes(*_settings("prompt seed cfg size"))
def trace(given: dict[str, Any], out: Out = OUT, quiet: Quiet = False) -> None:
    """Every module in the order in which they run: shapes, parameters, FLOPs, time, mean and std.

    Prints the table, and writes it as a page whose rows lead to the source, and as JSON. Look for where the
    time goes and where the arithmetic goes: they are not the same places.
    """
    settings, request = _request(given)
    with writable(Path(out)):
        pipe = _pipe(settings)
        from ..album import slug
        from ..explain.trace import trace as look

        target = free(Path(out) / f"trace-{slug(request.prompts[0])}-{request.seed}")
        table = look(pipe, request)
        target.mkdir()
        table.save(target)
    if not quiet:
        print(table.text())
    print(target / "trace.html")


def _command(experiment: Experiment) -> Callable[..., None]:
    """Returns the command that makes the picture, and prints its place and what to look for."""

    @takes(
        *_settings(experiment.settings),
        *(
            option(one.name, one.help, one.default, *one.flags, kind=one.kind, shown=one.shown, **one.typer)
            for one in experiment.own
        ),
    )
    def show(given: dict[str, Any], out: Out = OUT, quiet: Quiet = False) -> None:
        texts = {one.name: given.pop(one.name, None) for one in experiment.own}
        own = {
            one.name: None if texts[one.name] is None else one.read(texts[one.name]) for one in experiment.own
        }
        experiment.check(own)
        varied = [
            (one.varies, value) for one in experiment.own if one.varies for value in _all(own[one.name])
        ]
        settings, request = _request(given, varied)
        with writable(Path(out)):
            pipe = _pipe(settings)
            from ..album import slug

            module, _, name = experiment.function.partition(".")
            function = getattr(import_module(f"reifusion.explain.{module}"), name)
            exhibit: Exhibit = function(pipe, request, **own)
            said = {"prompt": request.prompts[0], "seed": request.seed, "steps": request.steps, **texts}
            file = experiment.file.format(**said, subject=slug(experiment.subject(said)))
            path = free(Path(out) / f"{file}.png")
            exhibit.save(path)
        if not quiet and exhibit.table:
            print(exhibit.table)
        print(path)
        if not quiet:
            print("\n" + textwrap.fill(exhibit.guide, min(100, shutil.get_terminal_size().columns)))

    return show


def _all(values: Any) -> list[Any]:
    return [] if values is None else values if isinstance(values, list) else [values]


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=GUIDE[_name], short_help=_experiment.about)(_command(_experiment))
