"""`reifusion generate`: draws pictures, each with its settings inside."""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import replace
from os.path import exists
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import shown
from ..files import writable
from ..settings import ABOUT, Settings, parsed, sampler_names, schedule_names
from .options import setting, takes


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
    film: Annotated[
        str | None, typer.Option(help="Show how it comes about in this .webp, .gif or .png file, animated.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went; write a trace beside the picture.")
    ] = False,
) -> None:
    """Draws a picture and says where it is. If --init-image is a folder, one for each picture in it."""
    from .. import album
    from ..film import Film, animated
    from ..model.tuning import warn_of_little_noise
    from ..settings import pictures_of
    from ..studio.known import never_read

    before = None if like is None else album.read(like)
    if before is not None and not before.ours and "model" not in given:
        raise ValueError(
            f"{like} was drawn by another program with the model {shown(before.model_name)}; "
            "say with --model where that is"
        )
    usual = Settings() if before is None else replace(before.settings, manner=before.drawn_in())
    if before is not None and not before.ours and "lora" not in given:
        usual = _with_loras_that_are_here(usual, str(like))
    settings = replace(usual, **parsed(given, usual.manner))
    reel = None if film is None else animated(film)
    if settings.code is not None:
        settings = _with_code(settings, like if "code" not in given else None)
    inputs = pictures_of(settings.init_image)
    every = [replace(settings, init_image=one) for one in inputs]
    config = settings.config()
    for each in every:
        asked = each.request(num).for_model(config)
        each.nth(asked.seeds[0], num - 1)  # the last one has a seed too
    file = album.png_path(out)
    if len(every) > 1 and file is not None:
        raise ValueError(f"--init-image is a folder, so --out must be one too, and not {out}")
    beside = writable(reel.parent) if reel else contextlib.nullcontext()
    with writable(file.parent if file else Path(out)), beside:
        pipe = settings.pipe(device, compile, idle_device)
        if words := never_read(pipe.config.name, settings.prompt or ""):
            warnings.warn(words[0].lower() + words.rstrip(".")[1:], stacklevel=2)
        for settings in every:
            request = settings.request(num).for_model(config)
            warn_of_little_noise(pipe.sampler(request), request)
            entry = album.entry(settings, request, pipe)
            if before is not None:
                album.warn_if_changed(before, entry, [name for name in album.FILES if name not in given])
            for k in range(num):
                # One at a time, so that not a bit of a picture depends on --num.
                each = settings.nth(request.seeds[0], k)
                one = replace(request, seed=each.seed, num=1)
                said = replace(entry.settings, seed=each.seed, variation_seed=each.variation_seed)
                steps = None if reel is None else Film(pipe)
                with _profiled(pipe) if profile else contextlib.nullcontext() as times:
                    picture = each.draw(pipe, one, progress=not quiet and sys.stderr.isatty(), callback=steps)
                    path = file or Path(out) / _name(said, len(every) > 1)
                    path = album.save(picture, replace(entry, settings=said), path)
                print(path, flush=True)
                if steps is not None and reel is not None:
                    print(steps.save(reel, picture), flush=True)
                if times is not None:
                    print(times.text(), file=sys.stderr)
                    times.save(path.with_suffix(".trace.json"))


def _name(settings: Settings, of_many: bool) -> str:
    """Returns the name of a picture's file; of_many: with that of its init image, if they are a folder's."""
    from .. import album

    name = album.file_name(settings)
    return f"{Path(str(settings.init_image)).stem}-{name}" if of_many else name


def _with_loras_that_are_here(settings: Settings, like: str) -> Settings:
    """Leaves out LoRAs of another program's picture whose files are not here, with a warning."""
    missing = [file for file, *_ in settings.lora if not exists(file)]
    if missing:
        said = f"{like} was drawn with {', '.join(missing)}, not found here; say with --lora where that is"
        warnings.warn(said, stacklevel=2)
    return replace(settings, lora=tuple(one for one in settings.lora if one[0] not in missing))


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
