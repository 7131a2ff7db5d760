"""`reifusion explain …`: a prompt explains one picture, a name is an experiment. PyTorch is imported late."""

from __future__ import annotations

import importlib.util
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..cli import DEFAULTS, InputError, _hash, _metadata, _open, _parse_size, _slug, _writable
from ..files import free, whole
from .guide import GUIDE

if TYPE_CHECKING:
    from ..model.pipeline import StableDiffusion
    from ..model.request import Request
    from .figures import Exhibit

app = typer.Typer(
    add_completion=False,
    help="Shows how a picture comes about.\n\n"
    "With a prompt: everything about one picture, in a folder with a page to begin from. With a name from "
    "below: one picture that answers one question, and what to look for in it. (For a prompt that is such a "
    "name: explain picture NAME.)",
)

Prompt = Annotated[str, typer.Argument(help="What to draw.", show_default=False)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same picture.")]
Steps = Annotated[int | None, typer.Option(help="1 to 1000.", show_default="the model's")]
Cfg = Annotated[
    float | None,
    typer.Option(help="How closely to follow the prompt; 1 is no guidance.", show_default="the model's"),
]
Sampler = Annotated[str | None, typer.Option(help="As in generate.", show_default="the model's")]
Model = Annotated[str, typer.Option(help="A .safetensors or .ckpt file, a diffusers folder, or owner/name.")]
Size = Annotated[str | None, typer.Option(help="Width x height, like 512x768.", show_default="the model's")]
Out = Annotated[str, typer.Option(help="The folder to write to.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only where the result is.")]
OUT = "explain"


def main(arguments: list[str]) -> int:
    """Runs `reifusion explain` with these arguments -> the exit code. Errors are raised, as typer's are."""
    names = [
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    ]
    if arguments and arguments[0] not in (*names, "--help"):
        arguments = ["picture", *arguments]
    return app(arguments or ["--help"], prog_name="reifusion explain", standalone_mode=False) or 0


@app.command()
def picture(
    prompt: Prompt, negative: Annotated[str, typer.Option(help="What to keep away from.")] = "",
    seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None, size: Size = None,
    pixel: Annotated[str | None, typer.Option(help="x,y of a place: what does it look at?")] = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Everything about one picture: how it formed, which word made which pixel, what every module did."""
    place = None if pixel is None else _pixel(pixel)
    request = _request(model, prompt, negative, seed, steps, cfg, sampler, size)
    with _writable(Path(out)):
        pipe, request = _load(model, request)
        from .folder import explain

        target = free(Path(out) / f"{_slug(prompt)}-{seed}")
        settings = DEFAULTS | {
            "prompt": prompt, "negative": negative, "seed": seed,
            "steps": request.n_inference_steps, "cfg": request.cfg_scale,
            "sampler": request.sampler_name, "size": request.size(pipe.config), "model": model,
            "model_hash": _hash("model", model), "model_name": pipe.config.name,
            "dtype": str(pipe.dtype).removeprefix("torch."),
        }  # fmt: skip
        with whole(target) as building:
            building.mkdir()
            explain(pipe, request, building, place, _metadata(settings))
    print(target / "index.html")
    if not quiet:
        print("\nOpen it in a browser. Beside it are the pictures, and as data all that they were made from.")


@app.command(
    help=GUIDE["words"],
    short_help="Where the picture looked at each word; or by step, layer, head, or from a pixel.",
)
def words(
    prompt: Prompt,
    by: Annotated[str, typer.Option(help="word, step, layer, head, or pixel.")] = "word",
    word: Annotated[str | None, typer.Option(help="Only this one.", show_default="the most telling")] = None,
    special: Annotated[bool, typer.Option("--special", help="Also show start, end and padding.")] = False,
    pixel: Annotated[str | None, typer.Option(help="x,y of the place that looks, for --by pixel.")] = None,
    seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None, size: Size = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    if by not in ("word", "step", "layer", "head", "pixel"):
        raise InputError(f"--by is word, step, layer, head or pixel, not {by!r}")
    if (by == "pixel") != (pixel is not None):
        raise InputError("--by pixel and --pixel x,y belong together")
    place = None if pixel is None else _pixel(pixel)
    request = _request(model, prompt, "", seed, steps, cfg, sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .words import watch

        with watch(pipe, request, place) as attention:
            *_, last = pipe.denoise(request)
        telling = attention.telling(1 if by == "head" else 6)
        chosen = [attention.find(word)] if word else telling or attention.special
        drawn = pipe.decode(last.latents)[0]
        if by == "step":
            return attention.by_step(drawn, chosen)
        if by == "layer":
            return attention.by_layer(drawn, chosen)
        if by == "head":
            return attention.by_head(drawn, chosen[0])
        return attention.of_pixel(drawn) if by == "pixel" else attention.by_word(drawn, special)

    _show(look, request, model, out, f"words-by-{by}-{_slug(prompt)}-{seed}", quiet)


@app.command()
def trace(
    prompt: Prompt, seed: Seed = 0, cfg: Cfg = None, size: Size = None, model: Model = "mini", out: Out = OUT,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Every module in the order in which they run: shapes, parameters, FLOPs, time, mean and std.

    Prints the table, and writes it as a page whose rows lead to the source, and as JSON. Look for where the
    time goes and where the arithmetic goes: they are not the same places.
    """
    request = _request(model, prompt, "", seed, None, cfg, size=size)
    with _writable(Path(out)):
        pipe, request = _load(model, request)
        from .trace import trace as look

        target = free(Path(out) / f"trace-{_slug(prompt)}-{seed}")
        table = look(pipe, request)
        target.mkdir()
        table.save(target)
    if not quiet:
        print(table.text())
    print(target / "trace.html")


@app.command(help=GUIDE["cfg"], short_help="The same noise under weaker and stronger guidance.")
def cfg(
    prompt: Prompt,
    scales: Annotated[str, typer.Option(help="Guidance scales, with commas between.")] = "1,2,4,7.5,12,20",
    seed: Seed = 0, steps: Steps = None, sampler: Sampler = None, size: Size = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    values = _numbers("--scales", scales, float)
    request = _request(model, prompt, "", seed, steps, values[0], sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .experiments import cfg

        return cfg(pipe, request, values)

    _show(look, request, model, out, f"cfg-{_slug(prompt)}-{seed}", quiet)


@app.command(help=GUIDE["steps"], short_help="The same noise in few steps and in many.")
def steps(
    prompt: Prompt,
    counts: Annotated[str, typer.Option(help="Numbers of steps, with commas between.")] = "1,2,4,8,16,32,64",
    samplers: Annotated[str | None, typer.Option(help="With commas between.")] = None,
    seed: Seed = 0, cfg: Cfg = None, size: Size = None, model: Model = "mini", out: Out = OUT,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    values = _numbers("--counts", counts, int)
    names = samplers.split(",") if samplers else None
    for name in names or (None,):  # all that was asked for is looked at before work begins
        for count in values:
            request = _request(model, prompt, "", seed, count, cfg, name, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .experiments import steps

        return steps(pipe, request, values, names)

    _show(look, request, model, out, f"steps-{_slug(prompt)}-{seed}", quiet)


@app.command(help=GUIDE["samplers"], short_help="The same noise, every sampler.")
def samplers(
    prompt: Prompt, seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, size: Size = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg, size=size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .experiments import samplers

        return samplers(pipe, request)

    _show(look, request, model, out, f"samplers-{_slug(prompt)}-{seed}", quiet)


@app.command(help=GUIDE["seeds"], short_help="A walk from one noise to another.")
def seeds(
    prompt: Prompt,
    seed: Annotated[int, typer.Option(help="Where the walk begins.")] = 0,
    to: Annotated[int, typer.Option(help="Where it ends.")] = 1,
    stops: Annotated[int, typer.Option(help="Pictures on the way, both ends included.", min=2)] = 7,
    steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None, size: Size = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg, sampler, size)
    _request(model, prompt, "", to, steps, cfg, sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .experiments import seeds

        return seeds(pipe, request, to, stops)

    _show(look, request, model, out, f"seeds-{_slug(prompt)}-{seed}-{to}", quiet)


@app.command(help=GUIDE["prompts"], short_help="A walk from one prompt to another.")
def prompts(
    prompt: Prompt,
    to: Annotated[str, typer.Argument(help="The prompt at the other end.", show_default=False)],
    stops: Annotated[int, typer.Option(help="Pictures on the way, both ends included.", min=2)] = 7,
    seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None, size: Size = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg, sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .experiments import prompts

        return prompts(pipe, request, to, stops)

    _show(look, request, model, out, f"prompts-{_slug(f'{prompt} to {to}')}-{seed}", quiet)


@app.command(help=GUIDE["ablate"], short_help="Without a word, a layer, a head.")
def ablate(
    prompt: Prompt, seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None,
    size: Size = None, model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg, sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .ablate import ablate

        return ablate(pipe, request)

    _show(look, request, model, out, f"ablate-{_slug(prompt)}-{seed}", quiet)


@app.command(help=GUIDE["latents"], short_help="The latents' channels, and what each is for.")
def latents(
    prompt: Prompt, seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None,
    size: Size = None, model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg, sampler, size)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .latents import latents

        return latents(pipe, request)

    _show(look, request, model, out, f"latents-{_slug(prompt)}-{seed}", quiet)


@app.command(help=GUIDE["vae"], short_help="A picture, there and back through the VAE.")
def vae(
    file: Annotated[str | None, typer.Argument(help="Any picture.", show_default="a test card")] = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    given = _open(file)
    request = _request(model)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .latents import round_trip

        return round_trip(pipe, given)

    _show(look, request, model, out, f"vae-{_slug(Path(file).stem) if file else 'test-card'}", quiet)


@app.command(help=GUIDE["schedule"], short_help="How much noise when, and when samplers look.")
def schedule(
    steps: Steps = None, seed: Seed = 0, model: Model = "mini", out: Out = OUT, quiet: Quiet = False
) -> None:
    request = _request(model, seed=seed, steps=steps)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .schedule import schedule

        return schedule(pipe, request)

    _show(look, request, model, out, f"schedule-{request.n_inference_steps}", quiet)


@app.command(help=GUIDE["tokens"], short_help="How a prompt is cut into tokens.")
def tokens(prompt: Prompt, model: Model = "mini", out: Out = OUT, quiet: Quiet = False) -> None:
    request = _request(model, prompt)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .tokens import tokens

        return tokens(pipe.tokenizer, prompt)

    _show(look, request, model, out, f"tokens-{_slug(prompt)}", quiet)


@app.command(
    help=GUIDE["halves"],
    short_help="Do words find their things? Measured on prompts with a left and a right.",
)
def halves(
    num: Annotated[int, typer.Option(help="How many pictures.", min=1)] = 12,
    seed: Seed = 0, steps: Steps = None, cfg: Cfg = None, sampler: Sampler = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, "", "", seed, steps, cfg, sampler)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .halves import halves

        exhibit = halves(pipe, request, num)
        if not quiet:
            print(f"{'prompt':56} {'word':12} share   IoU  IoU of the other side")
            for one in exhibit.numbers["findings"]:
                numbers = f"{one['share']:5.2f} {one['iou']:5.2f} {one['other_iou']:5.2f}"
                print(f"{one['prompt']:56} {one['word']:12} {numbers}")
        return exhibit

    _show(look, request, model, out, f"halves-{num}-{seed}", quiet)


@app.command(help=GUIDE["bugs"], short_help="Famous mistakes, switched on.")
def bugs(
    prompt: Prompt, seed: Seed = 0, steps: Steps = None, cfg: Cfg = None,
    only: Annotated[str | None, typer.Option(help="Names of some, with commas.", show_default="all")] = None,
    model: Model = "mini", out: Out = OUT, quiet: Quiet = False,
) -> None:  # fmt: skip
    request = _request(model, prompt, "", seed, steps, cfg)

    def look(pipe: StableDiffusion, request: Request) -> Exhibit:
        from .bugs import BUGS, gallery

        names = list(BUGS) if only is None else only.split(",")
        for name in names:
            if name not in BUGS:
                raise InputError(f"there is no bug {name!r}; there are {', '.join(BUGS)}")
        return gallery(pipe, request, names)

    _show(look, request, model, out, f"bugs-{_slug(prompt)}-{seed}", quiet)


# What the commands share


def _request(
    model: str, prompt: str = "", negative: str = "", seed: int = 0, steps: int | None = None,
    cfg: float | None = None, sampler: str | None = None, size: str | None = None,
) -> Request:  # fmt: skip
    """What was asked for; what was not is what the model's pictures are best drawn with."""
    from ..weights import info
    from ..model.request import Request

    width, height = (None, None) if size is None else _parse_size(size)
    asked = {"steps": steps, "cfg": cfg, "sampler": sampler}
    best = info(model).config.best | {name: value for name, value in asked.items() if value is not None}
    return Request(
        prompt, negative, cfg_scale=best["cfg"], sampler_name=best["sampler"],
        n_inference_steps=best["steps"], seed=seed, width=width, height=height,
    )  # fmt: skip


def _load(model: str, request: Request) -> tuple[StableDiffusion, Request]:
    """The model, and the request if it fits."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('explaining needs matplotlib: pip install "reifusion[explain]"')
    from ..api import load

    pipe = load(model)
    return pipe, replace(request, sampler_name=request.sampler(pipe.config))


def _show(look: Any, request: Request, model: str, out: str, name: str, quiet: bool) -> None:
    """Runs the experiment, writes its picture, and prints where it is and what to look for."""
    with _writable(Path(out)):
        pipe, request = _load(model, request)
        exhibit = look(pipe, request)
        path = free(Path(out) / f"{name}.png")
        exhibit.save(path)
    print(path)
    if not quiet:
        print("\n" + textwrap.fill(exhibit.guide, min(100, shutil.get_terminal_size().columns)))


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{option} takes {what} with commas between, not {text!r}") from None


def _pixel(text: str) -> tuple[int, int]:
    numbers = _numbers("--pixel", text, int)
    if len(numbers) != 2:
        raise InputError(f"--pixel takes two whole numbers, x,y, not {text!r}")
    return numbers[0], numbers[1]
