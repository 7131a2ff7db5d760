"""`reifusion generate`: draws pictures, each with its settings inside."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import shown
from ..files import writable
from ..settings import ABOUT, Settings, parsed, sampler_names, schedule_names
from .options import setting, takes

if TYPE_CHECKING:
    pass


@takes(*map(setting, ABOUT))
def generate(
    given: dict[str, Any],
    num: Annotated[int, typer.Option(help="How many pictures; their seeds count up.")] = 1,
    out: Annotated[str, typer.Option(help="A .png file, or a folder.")] = "images",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
    idle_device: Annotated[
        str | None,
        typer.Option(help="Where networks wait that do not work now: cpu spares a GPU's memory."),
    ] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the model: a slow first picture, then fast ones."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the pictures are.")] = False,
    like: Annotated[
        str | None, typer.Option(help="Repeat this picture; other options override its settings.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went; write a trace beside the picture.")
    ] = False,
) -> None:
    """Draws a picture and says where it is."""
    from .. import album

    before = None if like is None else album.read(like)
    if before is not None and not before.ours and "model" not in given:
        raise ValueError(
            f"{like} was drawn by another program with the model {shown(before.model_name)}; "
            "say with --model where that is"
        )
    settings = replace(Settings() if before is None else before.settings, **parsed(given))
    if settings.code is not None:
        settings = _with_code(settings, like if "code" not in given else None)
    request = settings.request(num)
    request = request.for_model(settings.config())
    file = album.png_path(out)
    with writable(file.parent if file else Path(out)):
        pipe = settings.pipe(device, compile, idle_device)
        entry = album.entry(settings, request, pipe)
        if before is not None:
            album.warn_if_changed(before, entry, [name for name in album.FILES if name not in given])
        for k in range(num):
            # One at a time, so that not a bit of a picture depends on --num.
            each = settings.nth(request.seeds[0], k)
            one = replace(request, seed=each.seed, num=1)
            said = replace(entry.settings, seed=each.seed, variation_seed=each.variation_seed)
            entry = replace(entry, settings=said)
            with _profiled(pipe) if profile else contextlib.nullcontext() as times:
                picture = each.draw(pipe, one, progress=not quiet and sys.stderr.isatty())
            path = file or Path(out) / album.file_name(entry.settings)
            path = album.save(picture, entry, path)
            print(path, flush=True)
            if times is not None:
                print(times.text(), file=sys.stderr)
                times.save(path.with_suffix(".trace.json"))


def _with_code(settings: Settings, picture: str | None) -> Settings:
    """Runs the user's file with samplers, unless it is only known from a picture, whose path is given."""
    if picture is None:
        from ..own import run_file

        run_file(str(settings.code))
    elif own := _not_built_in(settings):
        raise ValueError(
            f"{picture} was drawn with the {own} of {settings.code}; "
            "if you trust that file, give it with --code"
        )
    else:
        settings = replace(settings, code=None)
    return settings


def _not_built_in(settings: Settings) -> str:
    """Returns which sampler or schedule is of the user's own file, in words; "" if neither is."""
    if settings.sampler not in (None, *sampler_names()):
        return f"sampler {shown(settings.sampler)}"
    own = settings.schedule not in (None, *schedule_names())
    return f"schedule {shown(settings.schedule)}" if own else ""


def _profiled(pipe: Any) -> Any:
    from ..explain.profile import profiled

    return profiled(pipe)
