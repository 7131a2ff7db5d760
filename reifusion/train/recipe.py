"""Recipes: everything that decides a training run, in one flat file.

    steps = 20_000   # of the U-Net
    lr = 1e-3

Each key is a field of `Recipe`, of the training's dataclass (see `TRAININGS`) or of `LoopConfig`; a key that
the file leaves out has the field's default. On the command line, `key=value` overrides the file.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .control import ControlTraining
from .inversion import InversionTraining
from .keys import Key, RecipeError, about, check, key, shortened
from .lora import LoRATraining
from .sharpen import Sharpening
from .text2image import TextToImageTraining
from .vae import VAETraining

TRAININGS = {
    "vae": VAETraining,
    "sharpen": Sharpening,
    "text2image": TextToImageTraining,
    "lora": LoRATraining,
    "inversion": InversionTraining,
    "control": ControlTraining,
}
FROM_NOTHING = ("vae", "sharpen", "text2image")
DENOISERS = ("text2image", "lora")
CAPTIONED = (*DENOISERS, "control")
DRAW = (*DENOISERS, "inversion")  # trainings that show pictures of prompts
# In a checkout, the recipes lie beside the package; in an installed package, inside it.
FOLDERS = (Path(__file__).parent.parent.parent / "recipes", Path(__file__).parent / "recipes")


# Keys as other trainers call them.
ELSEWHERE = {
    "learning_rate": "lr", "unet_lr": "lr", "max_train_steps": "steps", "iterations": "steps",
    "train_batch_size": "batch", "batch_size": "batch", "gradient_accumulation_steps": "accumulate",
    "lr_warmup_steps": "warmup", "resolution": "size", "image_size": "size", "network_dim": "rank",
    "network_alpha": "alpha", "train_data_dir": "data", "dataset": "data", "output_dir": "folder",
    "output": "out", "pretrained_model_name_or_path": "start", "min_snr_gamma": "max_snr",
    "snr_gamma": "max_snr", "noise_offset": "offset_noise", "v_parameterization": "prediction_type",
    "random_flip": "mirror", "flip_aug": "mirror", "save_precision": "dtype", "network_dropout": "dropout",
    "prompt": "caption", "instance_prompt": "caption", "ema_decay": "ema", "grad_clip": "max_grad_norm",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The inputs and outputs of a run. `training` has the other keys, which are flat in the file as well."""

    train: str = key(
        "", "vae, sharpen, text2image, lora, inversion or control: a file is used by that command only"
    )
    data: str = key(
        "emoji",
        'a folder, parquet, .tar shards or a hub id; "emoji": the mini\'s own pictures; "shapes": tiny\'s',
    )
    split: str = key("train", "the split of the data, if it has several")
    image_column: str = key("", 'the column of the pictures; "": found by name and type')
    caption_column: str = key("", 'the column of the captions; "": found by name')
    model: str = key(
        "mini",
        "sizes of a model that is trained from nothing: tiny, 7m, 16m, mini, 75m (by parameters), mini-mm or"
        " sd15",
        trains=FROM_NOTHING,
    )
    channels: tuple[int, ...] = key(
        (), "of the U-Net, one for each resolution; none: the model's own", least=1, trains=FROM_NOTHING
    )
    vae_channels: tuple[int, ...] = key(
        (), "of the VAE, one for each resolution; none: the model's own", least=1, trains=FROM_NOTHING
    )
    text_width: int = key(
        0, "numbers of a word in the text encoder; 0: the model's own", least=0, trains=FROM_NOTHING
    )
    patch: int = key(
        0,
        "latents along a side of what the U-Net sees as one place; 0: the model's own",
        least=0,
        trains=FROM_NOTHING,
    )
    start: str = key(
        "",
        'a model to train further, as in generate --model, or a VAE\'s file; "": from nothing,'
        " or for a LoRA, a word and a ControlNet the mini",
    )
    vae: str = key("", 'the model whose VAE makes the latents; "": that of start', trains=("text2image",))
    size: int = key(
        0, "side in pixels of the pictures, or of a square with their area; 0: the model's", least=0
    )
    scenes: int = key(
        240_000,
        "emoji: the number of pictures to compose, or as many as a seventh of `minutes` is enough for",
        least=1,
        trains=("text2image",),
    )
    prediction_type: str = key(
        "",
        'what the U-Net predicts; "": as its model says',
        choices=("", "epsilon", "v_prediction", "flow"),
        trains=DENOISERS,
    )
    zero_terminal_snr: bool = key(
        False, "with v_prediction: all noise at the last timestep", trains=DENOISERS
    )
    mirror: bool = key(False, "true: pictures of your own are also shown mirrored")
    trigger: str = key("", 'words put before every caption, as "a zork,"', trains=CAPTIONED)
    shuffle_tags: bool = key(
        False, "true: the parts of a caption between commas come in any order", trains=CAPTIONED
    )
    keep_tags: int = key(
        1, "the first parts of a caption, which stay where they are", least=0, trains=CAPTIONED
    )
    crops: int = key(
        1, "different parts of each picture to learn from; 1: its middle", least=1, trains=CAPTIONED
    )
    regularisation: str = key(
        "",
        "pictures of what must not change, as data; each step learns from these with a chance of one half",
        trains=DENOISERS,
    )
    prompts: tuple[str, ...] = key(
        (),
        "prompts of the sheets, or .txt files with one a line; none: some of the captions, or for a new word"
        " some with it",
        trains=DRAW,
    )
    validation: float = key(
        0.0,
        "share of the pictures that is held out; a loss that rises there says that the others are learned by"
        " heart",
        least=0,
        below=1,
        trains=CAPTIONED,
    )
    validation_data: str = key("", "other pictures to measure the loss on, as data", trains=CAPTIONED)
    folder: str = key("", 'for checkpoints, curves and sheets; "": runs/ and the recipe\'s name')
    out: str = key("", 'the file of the finished model; "": in the folder')
    dtype: str = key(
        "",
        "number format of the model that is written; bf16 halves the file and rounds small changes away, int8"
        ' halves it again; "": that of start, and fp32 from nothing',
        choices=("", "fp32", "bf16", "fp16", "int8"),
        trains=("text2image",),
    )
    wandb: str = key("", 'a project of Weights & Biases that gets the curves and sheets too; "": none')
    expected: tuple[tuple[float, float, float], ...] = key(
        (), "for --plot: rows of a step and the lowest and highest loss to expect there"
    )
    training: Any = field(default=None)

    def __post_init__(self) -> None:
        check(self)
        if not self.data.strip():
            raise RecipeError("data is empty; set it to a folder of pictures")


def find(name: str) -> Path:
    """Returns the file of a recipe, given by its path or by the name of one that comes with reifusion."""
    path = Path(name)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise RecipeError(f"there is no recipe at {name}")
    ours = {file.stem: file for folder in FOLDERS for file in sorted(folder.glob("*.toml"))}
    if name in ours:
        return ours[name]
    raise RecipeError(
        f"there is no recipe {name!r}; there are {', '.join(sorted(ours))}, or give a .toml file"
    )


def read(what: str, file: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe for training `what` from a file and `key=value` overrides. Raises RecipeError."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"the recipe {file} cannot be read: {error}") from None
        for key in values:
            _check(what, key, f"the recipe {file}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not key=value")
        _check(what, key.strip(), "the command line")
        values[key.strip()] = _parse(text.strip(), keys(what)[key.strip()][0])
    if values.get("train", what) != what:
        where = f"the recipe {file}" if file else "the command line"
        raise RecipeError(f"{where} trains {shortened(values['train'])}, not {shortened(what)}")
    recipe = _fill(Recipe(train=what), values)
    loop = _fill(TRAININGS[what]().loop, values)
    training = _fill(replace(TRAININGS[what](), loop=loop), values)
    folder = recipe.folder or f"runs/{file.stem if file else what}"
    return replace(recipe, training=training, folder=folder, out=recipe.out or f"{folder}/model.safetensors")


def keys(what: str) -> dict[str, tuple[Any, Key]]:
    """Returns every key of a recipe, with its default and what there is to say about it."""
    training = TRAININGS[what]()
    return {
        name: (getattr(settings, name), its)
        for settings in (training.loop, training, Recipe(train=what))
        for name, its in about(settings).items()
        if not its.trains or what in its.trains
    }


def described(what: str) -> str:
    """Returns a line for every key: its name, its default, its sentence and its limits."""
    rows = []
    for name, (default, its) in keys(what).items():
        limits = f" ({its.limits})" if its.limits else ""
        rows.append(f"{name:22} {_toml(default):24} {its.says}{limits}")
    return "\n".join(rows)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return f'"{value}"'
    return "none" if value is None else str(value).lower()


def _check(what: str, key: str, where: str) -> None:
    known = keys(what)
    if key in known:
        return
    others = [other for other in TRAININGS if key in keys(other)]
    near = difflib.get_close_matches(key, known, 1)
    if others:
        hint = f", only for training {' and '.join(others)}"
    elif ELSEWHERE.get(key.lower().replace("-", "_")) in known:
        hint = f"; here it is called {ELSEWHERE[key.lower().replace('-', '_')]}"
    else:
        hint = f"; did you mean {near[0]}?" if near else f"; `reifusion train {what} --keys` lists them"
    raise RecipeError(f"{where} sets {key!r}, which is not a setting for training {what}{hint}")


def _parse(text: str, default: Any) -> Any:
    """Reads a value as TOML; a text that is not TOML, such as a path or a word, is a string.

    So is everything where a string is expected: a folder may have the name 2026 or true.
    """
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(default, str) and not isinstance(value, str) else value


def _fill(thing: Any, values: dict[str, Any]) -> Any:
    """Returns the dataclass with those of the values that are its fields, each in the field's type."""
    hints = get_type_hints(type(thing))
    mine = {f.name for f in fields(thing)} & values.keys()
    return replace(thing, **{name: _as(hints[name], values[name], name) for name in mine})


def _as(wanted: Any, value: Any, name: str) -> Any:
    """Returns the value in the type of its field. Raises RecipeError."""
    options = get_args(wanted) if get_origin(wanted) is not tuple and get_args(wanted) else (wanted,)
    for option in options:
        if option is type(None) and value in (None, "none", "None"):
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            large = isinstance(value, int) and abs(value) >= 2**1000  # too large for a float
            return math.inf if large else float(value)
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            inside = get_args(option)
            many = len(value) if inside[-1] is Ellipsis else len(inside)
            if len(value) == many:
                kinds = inside[:1] * many if inside[-1] is Ellipsis else inside
                return tuple(_as(kind, v, name) for kind, v in zip(kinds, value))
        if option in (int, bool, str) and type(value) is option:
            return value
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
    raise RecipeError(f"{name} must be {' or '.join(map(_kind, options))}, not {shortened(value)}")


def _kind(option: Any) -> str:
    """Returns the name of a type, for an error message."""
    inside = get_args(option)
    if get_origin(option) is tuple and inside[-1] is Ellipsis:
        return f"a list in brackets, of {_kind(inside[0])}"
    if get_origin(option) is tuple:
        return f"[{', '.join(map(_kind, inside))}]"
    return "none" if option is type(None) else str(option.__name__)
