"""Recipes: everything that decides a training run, in one flat file.

    steps = 20_000   # of the U-Net
    lr = 1e-3

Each key is a field of `Recipe`, of the training's dataclass (`VAETraining`, `Sharpening`,
`TextToImageTraining` or `LoRATraining`) or of `LoopConfig`; a key that the file leaves out has the field's
default. On the command line, `key=value` overrides the file.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .lora import LoRATraining
from .sharpen import Sharpening
from .text2image import TextToImageTraining
from .vae import VAETraining

TRAININGS = {
    "vae": VAETraining,
    "sharpen": Sharpening,
    "text2image": TextToImageTraining,
    "lora": LoRATraining,
}
# In a checkout, the recipes lie beside the package; in an installed package, inside it.
FOLDERS = (Path(__file__).parent.parent.parent / "recipes", Path(__file__).parent / "recipes")


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says why, in one sentence."""


@dataclass(frozen=True)
class Recipe:
    """The inputs and outputs of a run. `training` has the other keys, which are flat in the file as well."""

    train: str = (
        ""  # vae, sharpen, text2image or lora: a file names it, so that no other command uses the file
    )
    data: str = "emoji"  # a folder, parquet, .tar shards or a hub id; "emoji": the mini's own pictures
    model: str = "mini"  # the sizes of a model that is trained from nothing: mini or sd15
    # A model to train further, as in `reifusion generate --model`, or the file of a VAE; "": from nothing.
    start: str = ""
    vae: str = ""  # text2image: the model whose VAE makes the latents; "": that of `start`
    size: int = 0  # side in pixels of the pictures, or of a square with their area; 0: the model's
    scenes: int = 60_000  # emoji: the number of pictures to compose
    prediction_type: str = ""  # epsilon, v_prediction or flow; "": the model's
    zero_terminal_snr: bool = False  # with v_prediction: all noise at the last timestep
    mirror: bool = False  # True: pictures of your own are also shown mirrored
    folder: str = ""  # for checkpoints, curves and sheets; "": runs/ and the recipe's name
    out: str = ""  # the finished model; "": in the folder
    expected: tuple[tuple[float, float, float], ...] = ()  # step, lowest and highest loss to expect there
    training: Any = field(default=None)


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
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"the recipe {file} cannot be read: {error}") from None
        for key in values:
            _check(what, key, f"the recipe {file}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise RecipeError(f"{override!r} is not key=value")
        _check(what, key.strip(), "the command line")
        values[key.strip()] = _parse(text.strip())
    if values.get("train", what) != what:
        raise RecipeError(f"the recipe {file} trains {values['train']}, not {what}")
    recipe = _fill(Recipe(train=what), values)
    loop = _fill(TRAININGS[what]().loop, values)
    training = _fill(replace(TRAININGS[what](), loop=loop), values)
    folder = recipe.folder or f"runs/{file.stem if file else what}"
    return replace(recipe, training=training, folder=folder, out=recipe.out or f"{folder}/model.safetensors")


def keys(what: str) -> dict[str, Any]:
    """Returns every key of a recipe, with its default."""
    training = TRAININGS[what]()
    known = {f.name: getattr(it, f.name) for it in (training.loop, training, Recipe()) for f in fields(it)}
    return {name: value for name, value in known.items() if name not in ("loop", "training")}


def _check(what: str, key: str, where: str) -> None:
    if key not in keys(what):
        near = difflib.get_close_matches(key, keys(what), 1)
        hint = f"; did you mean {near[0]}?" if near else f"; `reifusion train {what} --keys` lists them"
        raise RecipeError(f"{where} sets {key!r}, which is not a setting for training {what}{hint}")


def _parse(text: str) -> Any:
    """Reads a value as TOML; a text that is not TOML, such as a path or a word, is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


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
            return float(value)
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(tuple(v) if isinstance(v, list) else v for v in value)
        if option in (int, bool, str) and type(value) is option:
            return value
        if option is int and isinstance(value, float) and value.is_integer():
            return int(value)
    kind = " or ".join(
        getattr(option, "__name__", str(option)).replace("NoneType", "none") for option in options
    )
    raise RecipeError(f"{name} must be {kind}, not {value!r}")
