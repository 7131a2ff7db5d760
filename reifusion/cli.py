"""The command line. Whatever can be wrong with the user's input is found before the work starts.

Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 130 stopped by Ctrl-C. An error is one sentence
on stderr; REIFUSION_DEBUG=1 shows the traceback as well. PyTorch is imported by the commands, not here, so
that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from . import __version__
from .files import free, whole

if TYPE_CHECKING:
    from PIL import Image

# What a picture is made with where neither a flag nor --like says otherwise; `ModelConfig.best` has the rest.
DEFAULTS: dict[str, Any] = {
    "negative": "",
    "model": "mini",
    "strength": 0.8,
    "clip_skip": 0,
    "deepcache": 1,
    "tome": 0.0,
    "int8": False,
}

# The samplers, with the names that other programs know them by.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "flow": "Flow Euler",
}

# What of it a picture carries for --like.
REMEMBERED: dict[str, Any] = {
    "prompt": str,
    "negative": str,
    "model": str,
    "model_hash": str,
    "lora": list,
    "lora_hash": list,
    "sampler": str,
    "steps": int,
    "cfg": (int, float),
    "seed": int,
    "size": list,
    "init_image": str,
    "init_image_hash": str,
    "mask": str,
    "mask_hash": str,
    "strength": (int, float),
    "clip_skip": int,
    "guidance_interval": str,
    "deepcache": int,
    "tome": (int, float),
    "int8": bool,
    "dtype": str,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Stable Diffusion from scratch.")


class InputError(ValueError):
    """The user's input was wrong; the message says how, in one sentence."""


def _option(help: str, default: Any = None) -> Any:
    """An option that is None unless given, so that `--like` knows what to override."""
    return typer.Option(help=help if default is None else f"{help} (default: {default})", show_default=False)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)] = None,
    negative: Annotated[str | None, _option("What to keep away from.")] = None,
    model: Annotated[
        str | None,
        _option("A .safetensors or .ckpt file, a diffusers folder, or owner/name.", DEFAULTS["model"]),
    ] = None,
    lora: Annotated[
        list[str] | None, _option("A LoRA, as file or file:weight; can be given several times.")
    ] = None,
    sampler: Annotated[str | None, _option(f"One of {', '.join(SAMPLERS)}.", "the model's")] = None,
    steps: Annotated[int | None, _option("1 to 1000.", "the model's")] = None,
    cfg: Annotated[
        float | None, _option("How closely to follow the prompt; 1 is twice as fast.", "the model's")
    ] = None,
    seed: Annotated[int | None, _option("The same seed gives the same picture.", "a new one")] = None,
    num: Annotated[int, typer.Option(help="How many pictures; their seeds count up.")] = 1,
    size: Annotated[str | None, _option("Width x height, like 512x768.", "the model's")] = None,
    init_image: Annotated[str | None, _option("Begin with this picture.")] = None,
    mask: Annotated[str | None, _option("Redraw the init image only where this one is white.")] = None,
    strength: Annotated[
        float | None, _option("How much of the init image may change, to 1.", DEFAULTS["strength"])
    ] = None,
    clip_skip: Annotated[
        int | None, _option("Layers of the text encoder to leave out.", DEFAULTS["clip_skip"])
    ] = None,
    guidance_interval: Annotated[
        str | None, _option("Guidance only at noise from:to, like 0.3:5; other steps take half the time.")
    ] = None,
    deepcache: Annotated[
        int | None, _option("The U-Net's inside on every n-th step only.", DEFAULTS["deepcache"])
    ] = None,
    tome: Annotated[
        float | None, _option("The share of pixels merged before self-attention, to 0.75.", DEFAULTS["tome"])
    ] = None,
    int8: Annotated[bool | None, typer.Option("--int8/--no-int8", help="Weights of 8 bits.")] = None,
    out: Annotated[str, typer.Option(help="A .png file, or a folder.")] = "images",
    dtype: Annotated[str | None, _option("bf16, fp16 or fp32.", "what suits the device")] = None,
    device: Annotated[str | None, _option("cpu, cuda or mps.", "the best there is")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only where the pictures are.")] = False,
    like: Annotated[str | None, _option("Repeat this picture; other options override its settings.")] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went; write a trace beside the picture.")
    ] = False,
) -> None:
    """Draws a picture and says where it is."""
    given = {
        "prompt": prompt,
        "negative": negative,
        "model": model,
        "lora": [_parse_lora(one) for one in lora] if lora else None,
        "sampler": sampler,
        "steps": steps,
        "cfg": cfg,
        "seed": seed,
        "size": None if size is None else _parse_size(size),
        "init_image": init_image,
        "mask": mask,
        "strength": strength,
        "clip_skip": clip_skip,
        "guidance_interval": guidance_interval,
        "deepcache": deepcache,
        "tome": tome,
        "int8": int8,
        "dtype": dtype,
    }
    given = {name: value for name, value in given.items() if value is not None}
    remembered = {} if like is None else _read_settings(like)
    settings = {**DEFAULTS, **remembered, **given}
    if "prompt" not in settings:
        raise InputError('say what to draw, as in: reifusion generate "a cat"')

    from .shortcuts.int8 import quantize
    from .weights.lora import apply, load_lora
    from .weights import info
    from .api import load
    from .model.request import Request

    settings = info(settings["model"]).config.best | settings
    width, height = settings.get("size", (None, None))
    request = Request(
        settings["prompt"],
        settings["negative"],
        _open(settings.get("init_image")),
        settings["strength"],
        cfg_scale=settings["cfg"],
        sampler_name=settings["sampler"],
        n_inference_steps=settings["steps"],
        seed=settings.get("seed"),
        width=width,
        height=height,
        num_images=num,
        mask=_open(settings.get("mask")),
        clip_skip=settings["clip_skip"],
        guidance_interval=_parse_interval(settings.get("guidance_interval")),
        deepcache=settings["deepcache"],
        tome=settings["tome"],
    )
    loras = [(load_lora(name), weight) for name, weight in settings.get("lora", ())]
    file = _png_path(out)
    with _writable(file.parent if file else Path(out)):
        pipe = load(settings["model"], device, settings.get("dtype"))
        for change, weight in loras:
            apply(pipe, change, weight)
        if settings["int8"]:
            quantize(pipe)
        settings["sampler"] = request.sampler(pipe.config)
        settings["size"] = request.size(pipe.config)
        settings["dtype"] = str(pipe.dtype).removeprefix("torch.")
        settings["model_name"] = pipe.config.name
        for name in ("model", "lora", "init_image", "mask"):
            if name in settings:
                settings[f"{name}_hash"] = _hash(name, settings[name])
                if name in remembered and name not in given:
                    _warn_if_changed(name, remembered, settings)
        for one in request.seeds:
            # One at a time, so that not a bit of a picture depends on --num.
            settings["seed"] = one
            progress = not quiet and sys.stderr.isatty()
            with _profiled(pipe) if profile else contextlib.nullcontext() as times:
                picture = pipe.generate(replace(request, seed=one, num_images=1), progress=progress)
            path = file or Path(out) / f"{_slug(settings['prompt'])}-{one}.png"
            path = _save(cast("Image.Image", picture), settings, path)
            print(path, flush=True)
            if times is not None:
                print(times.text(), file=sys.stderr)
                times.save(path.with_suffix(".trace.json"))


@app.command()
def info(
    file: Annotated[str, typer.Argument(help="A model, or a picture drawn here.", show_default=False)],
) -> None:
    """Says what is in a file: a model's format and sizes, or a picture's settings."""
    if file.lower().endswith(".png"):
        facts: dict[str, Any] = _read_settings(file)
    else:
        from . import weights

        found = weights.info(file)
        config, schedule, numbers = found.config, found.config.schedule, found.parameters
        facts = {
            "file": found.path,
            "format": found.format,
            "model": f"{config.name}, for pictures of {config.size}x{config.size}",
            "size": f"{found.size / 1e6:,.1f} MB, {found.dtype}",
            "parameters": f"{sum(numbers.values()):,}",
            **{f"  {name}": f"{number:,}" for name, number in numbers.items()},
            "text": f"{config.clip.layers} layers of {config.clip.width}, {config.clip.vocab_size:,} tokens",
            "vae": f"1/{config.vae.factor} of each side, {config.vae.latent_channels} channels",
            "unet": f"channels {' '.join(map(str, config.unet.channels))}",
            "schedule": "flow"
            if schedule.prediction_type == "flow"
            else f"{schedule.beta_schedule}, {schedule.prediction_type}",
            **found.metadata,
        }
    for name, value in facts.items():
        print(f"{name:12} {value}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The model to read.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", help="What to write.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="native, compvis (one file) or diffusers (a folder).", show_default=False)
    ],
) -> None:
    """Writes a model in another format, bit for bit."""
    from . import weights
    from .model.model_converter import FORMATS

    if to not in FORMATS:
        raise InputError(f"there is no format {to!r}; there are {', '.join(FORMATS)}")
    if to != "diffusers" and not target.endswith(".safetensors"):
        raise InputError(f"the format {to} is a .safetensors file, not {target}")
    if os.path.exists(target):
        raise InputError(f"{target} is there already, and nothing is overwritten")
    with _writable(Path(target).parent):
        metadata = weights.info(source).metadata
        config, models, tokenizer = weights.load(source)
        weights.save(config, models, target, to, tokenizer, metadata)
    print(target)


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train(context: typer.Context) -> None:
    """Trains a model; `reifusion train --help` says how."""
    from .train.__main__ import main as train_main

    raise typer.Exit(train_main(context.args) or 0)


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def explain(context: typer.Context) -> None:
    """Shows how a picture comes about; `reifusion explain --help` says what there is."""
    from .explain.cli import main as explain_main

    raise typer.Exit(explain_main(context.args))


@app.command()
def studio(
    model: Annotated[
        str, typer.Option(help="A .safetensors or .ckpt file, a diffusers folder, or owner/name.")
    ] = "mini",
    port: Annotated[
        int | None,
        typer.Option(help="Where it listens.", min=1, max=65535, show_default="the first free one from 7860"),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    out: Annotated[str, typer.Option(help="The folder for the pictures.")] = "images",
) -> None:
    """Opens a page, on this machine only: draw, watch the picture form, look inside."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('the studio needs Gradio; install it with: pip install "reifusion[studio]"')
    from .studio.page import run

    with _writable(Path(out)):
        run(model, port, browser, out)


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="exercise", show_default=False)],
    number: Annotated[
        int, typer.Argument(help="Which one; the book's last chapter has them.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(help="The file with your function.", show_default=False)],
) -> None:
    """Tells whether your answer to an exercise of the book is right."""
    if what != "exercise":
        raise InputError(
            f"what can be checked is an exercise, as in: reifusion check exercise 1 mine.py, not {what!r}"
        )
    from .explain.exercises import check as check_exercise

    right, sentence = check_exercise(number, file)
    print(sentence)
    raise typer.Exit(0 if right else 1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"reifusion {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# What the commands read


def _parse_size(size: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})[x×X](\d{1,6})", size)
    if found is None:
        raise InputError(f"a size is width x height, like 512x768, not {size!r}")
    return int(found[1]), int(found[2])


def _parse_interval(text: str | None) -> tuple[float, float] | None:
    """0.3:5 -> (0.3, 5.0)"""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise InputError(f"a guidance interval is from:to, like 0.3:5, not {text!r}") from None
    return low, high


def _parse_lora(lora: str) -> tuple[str, float]:
    """zork.safetensors:0.8 -> the file and its weight, which is 1 if it is not given"""
    file, _, text = lora.rpartition(":")
    if Path(lora).exists() or not Path(file).is_file():  # a colon can be the path's own
        return lora, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(text)):
            return file, weight
    raise InputError(f"the weight of a LoRA is a number, as in {file}:0.8, not {text!r}")


def _is_lora(value: Any) -> bool:
    """Whether a picture's metadata can say so."""
    kinds = [type(part) for part in value] if isinstance(value, list) else []
    return kinds in ([str, float], [str, int])


def _open(path: str | None) -> Image.Image | None:
    """The picture, read to its end, so that a truncated one is found now."""
    if path is None:
        return None
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise InputError(f"there is no picture at {path}") from None
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError for broken files
        raise InputError(f"{path} cannot be read as a picture: {error}") from error


def _read_settings(path: str) -> dict[str, Any]:
    """What a picture of ours says it was made with; only what it can say, and of the right type."""
    try:
        carried = json.loads(getattr(_open(path), "text", {})["reifusion"])
        settings = {name: carried[name] for name in REMEMBERED if carried.get(name) is not None}
    except (KeyError, json.JSONDecodeError, AttributeError):
        raise InputError(f"{path} carries no settings of reifusion's") from None
    for name, value in settings.items():
        odd = not isinstance(value, REMEMBERED[name]) or (name == "size" and len(value) != 2)
        if odd or (name == "lora" and not all(map(_is_lora, value))):
            raise InputError(f"{path} carries settings, but its {name} is {value!r}")
    return settings


def _hash(name: str, source: Any) -> Any:
    """The first ten digits of the SHA-256 of a file, as others show it, or of all weights in a folder."""
    if name == "lora":
        return [_hash("", file) for file, _ in source]
    path = Path(source)
    if name == "model":
        from .weights import info

        path = info(source).path
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:10]


def _warn_if_changed(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if before.get(f"{name}_hash") != now[f"{name}_hash"]:
        what = "LoRA" if name == "lora" else name.replace("_", " ")
        which = " or ".join(file for file, _ in now[name]) if name == "lora" else now[name]
        warnings.warn(f"the {what} {which} is not what it was, so the picture will differ", stacklevel=1)


# What they write


def _profiled(pipe: Any) -> Any:
    from .profile import profiled

    return profiled(pipe)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Makes sure, now, that files can be written there. Folders that it made and that stay empty go again."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from None
        yield
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def _png_path(out: str) -> Path | None:
    """The file that `out` names, or None if it names a folder."""
    path = Path(out)
    if any(len(part.encode()) > 240 for part in path.parts):
        raise InputError(f"the name {out[:20]}… is too long")
    if path.suffix == "" or path.is_dir() or out.endswith(("/", os.sep)):
        return None
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are written as .png, not as {path.suffix}")
    return path


def _save(picture: Image.Image, settings: dict[str, Any], path: Path) -> Path:
    """Writes it to the path, or to path-2, path-3, … if that is taken: nothing is overwritten."""
    target = free(path)
    with whole(target) as temporary:
        picture.save(temporary, pnginfo=_metadata(settings))
    return target


def _slug(prompt: str) -> str:
    """'A cat, stretching' -> 'a-cat-stretching'"""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-") or "picture"


def _metadata(settings: dict[str, Any]) -> Any:
    """The settings twice: as JSON for `--like`, and as the text that other programs show and read."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    # A prompt that was not UTF-8 on the command line must not fail here, when the work is done.
    chunks.add_text("parameters", _parameters(settings).encode("utf-8", "replace").decode("utf-8"))
    chunks.add_text("reifusion", json.dumps({"version": __version__, **settings}))
    return chunks


def _parameters(settings: dict[str, Any]) -> str:
    """In the form that AUTOMATIC1111's web UI established."""
    width, height = settings["size"]
    loras = [(Path(file).stem, weight) for file, weight in settings.get("lora", ())]
    hashes = [f"{name}: {digest}" for (name, _), digest in zip(loras, settings.get("lora_hash", ()))]
    facts = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[settings["sampler"]],
        "CFG scale": settings["cfg"],
        "Seed": settings["seed"],
        "Size": f"{width}x{height}",
        "Model hash": settings["model_hash"],
        "Model": settings["model_name"],
        "Lora hashes": f'"{", ".join(hashes)}"' if loras else None,
        "Denoising strength": settings["strength"] if settings.get("init_image") else None,
        "Clip skip": settings["clip_skip"] + 1 if settings["clip_skip"] else None,  # they count from 1
        "Version": f"reifusion {__version__}",
    }
    lines = [" ".join([settings["prompt"], *(f"<lora:{name}:{weight:g}>" for name, weight in loras)])]
    if settings["negative"]:
        lines.append(f"Negative prompt: {settings['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


# The way in

# The base class of typer's usage errors. Typer carries click inside since 0.2x; before, it imported it.
_UsageError = cast("type[Exception]", typer.BadParameter.__mro__[2])


def _keep_blocks() -> None:
    """Large blocks of memory stay in the process, in huge pages; bench/NOTES.md says what that buys.

    glibc would give them back at once, and the next layer would get them again page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it when it first allocates
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    _keep_blocks()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("REIFUSION_DEBUG") == "1"
    with warnings.catch_warnings():
        if not debug:  # only our own, and only what they say
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module="reifusion")
            warnings.showwarning = lambda message, *_: print(f"reifusion: {message}", file=sys.stderr)
        try:
            code = app(arguments or ["--help"], prog_name="reifusion", standalone_mode=False) or 0
            return _fail("stopped", 130, False) if code == 130 else code
        except (KeyboardInterrupt, typer.Abort):
            return _fail("stopped", 130, False)
        except _UsageError as error:
            return _fail(cast(Any, error).format_message(), 2, debug)
        except ValueError as error:
            return _fail(str(error), 2, debug)
        except Exception as error:
            memory = isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error))
            message = "out of memory; try a smaller --size" if memory else str(error)
            return _fail(message or type(error).__name__, 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    first, *_ = message.strip().splitlines() or ["failed"]
    print(f"reifusion: {first}", file=sys.stderr)
    return code
