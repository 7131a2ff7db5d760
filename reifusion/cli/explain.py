"""`reifusion explain …`: with a prompt, everything about one picture; with a name, an experiment."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..explain.guide import GUIDE
from ..files import free, whole, writable
from ..settings import Settings, parsed
from .experiments import EXPERIMENTS, Experiment, pixel
from .options import option, setting, takes

if TYPE_CHECKING:
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


def _settings(names: str) -> list[inspect.Parameter]:
    """Returns options for these settings and the model. A prompt is required; the seed is 0 by default."""
    own: dict[str, dict[str, Any]] = {"prompt": {"required": True}, "seed": {"default": 0}}
    return [setting(name, **own.get(name, {})) for name in [*names.split(), "model"]]


def _request(given: dict[str, Any], varied: Iterable[tuple[str, Any]] = ()) -> tuple[Settings, Request]:
    """Returns what was asked for. varied: settings, by name, that an experiment is going to change.

    Raises ValueError, in one sentence, for what the model cannot draw: a look at its file tells, before
    loading.
    """

    settings = replace(Settings(prompt="", seed=0), **parsed(given))
    request, config = settings.request(), settings.config()
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
    place = pixel(given.pop("pixel")) if "pixel" in given else None
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
        print("\nOpen it in a browser. The pictures are beside it, and the data that they were made from.")


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


@app.command("toy")
def toy(
    world: Annotated[str, typer.Option(help="moons or spiral.")] = "moons",
    show: Annotated[
        str, typer.Option(help="noising, learning, paths, guidance or orders; all of them.")
    ] = "",
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    out: Out = OUT,
    quiet: Quiet = False,
) -> None:
    """Diffusion in a world of two numbers, where everything can be seen and the best answer is known.

    Needs no model: a small network is trained on the spot, in seconds. Look for what the arrows do as the
    noise grows, how paths differ, what guidance does, and how fast solvers come to the exact solution.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('explaining needs matplotlib: pip install "reifusion[explain]"')
    from ..explain.toy import EXHIBITS, WORLDS

    if world not in WORLDS:
        raise ValueError(f"there is no world {world!r}; there are {', '.join(WORLDS)}")
    if show and show not in EXHIBITS:
        raise ValueError(f"there is nothing called {show!r} to show; there are {', '.join(EXHIBITS)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed must be between 0 and {2**63 - 1}, not {seed}")
    with writable(Path(out)):
        for name in [show] if show else EXHIBITS:
            exhibit = EXHIBITS[name](world, seed)
            path = free(Path(out) / f"toy-{name}-{world}-{seed}.png")
            exhibit.save(path)
            print(path, flush=True)
            if not quiet:
                print(f"\n{_folded(f'{exhibit.alt} {exhibit.guide}', 100)}\n")


def _folded(text: str, width: int) -> str:
    """Returns the text in lines; an address stays whole, so that it can be copied."""
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _command(experiment: Experiment) -> Callable[..., None]:
    """Returns the command that makes the picture, and prints its place and what to look for."""

    @takes(*_settings(experiment.settings), *(one.parameter for one in experiment.own))
    def show(given: dict[str, Any], out: Out = OUT, quiet: Quiet = False) -> None:
        texts = {one.name: given.pop(one.name, None) for one in experiment.own}
        own = {
            one.name: None if texts[one.name] is None else one.read(texts[one.name]) for one in experiment.own
        }
        experiment.check(own)
        settings, request = _request(given, _varied(experiment, own))
        with writable(Path(out)):
            pipe = _pipe(settings)
            from ..album import slug

            exhibit = experiment(pipe, request, **own)
            values = {"prompt": request.prompts[0], "seed": request.seed, "steps": request.steps, **texts}
            name = experiment.file.format(**values, subject=slug(experiment.subject(values)))
            path = free(Path(out) / f"{name}.png")
            exhibit.save(path)
        if not quiet and exhibit.table:
            print(exhibit.table)
        print(path)
        if not quiet:
            print("\n" + _folded(exhibit.guide, min(100, shutil.get_terminal_size().columns)))

    return show


def _varied(experiment: Experiment, own: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns the settings that the experiment is going to vary: (name, value)."""
    varied = []
    for one in experiment.own:
        if one.varies and own[one.name] is not None:
            values = own[one.name] if isinstance(own[one.name], list) else [own[one.name]]
            varied += [(one.varies, value) for value in values]
    return varied


for _name, _experiment in EXPERIMENTS.items():
    app.command(_name, help=GUIDE[_name], short_help=_experiment.about)(_command(_experiment))
