"""How settings are spelled: on a command line, where they are texts, and in a picture's metadata, in JSON.

A setting is read by `read_…` and written by `write_…`; `carried_…` takes it from metadata, where a value may
have the wrong type, which is a ValueError.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from os.path import exists  # unlike Path's, it takes any name
from typing import Any, TypeAlias

from .model.sentences import shown

# A LoRA's file, its weight, and perhaps its block weights, as `weights/lora_blocks.py` reads them
LoRA: TypeAlias = tuple[str, float] | tuple[str, float, str]
ImagePrompt: TypeAlias = tuple[str, str, float]  # an IP-Adapter, a picture, its weight
# A ControlNet, its hint, its weight, and the shares of the steps in which it begins and ends
Control: TypeAlias = tuple[str, str, float, float, float]

NUMBER = r"-?\d*\.?\d+(?:e[+-]?\d+)?"  # as Python writes one, or a person does


def read_size(text: str) -> tuple[int, int]:
    """512x768 -> (512, 768)"""
    found = re.fullmatch(r"(\d{1,6})[x×X](\d{1,6})", text)
    if found is None:
        raise ValueError(f"a size is width x height, like 512x768, not {shown(text)}")
    return int(found[1]), int(found[2])


def read_interval(text: str) -> tuple[float, float]:
    """0.3:5 -> (0.3, 5.0)"""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"a guidance interval is from:to, like 0.3:5, not {shown(text)}") from None
    return low, high


def read_lora(text: str) -> LoRA:
    """zork.safetensors:0.8 -> the file and its weight, which is 1 unless the text says otherwise

    zork.safetensors:0.8:lbw=MIDD -> these two, and its block weights
    """
    whole, mark, blocks = text.rpartition(":lbw=")
    if mark and not exists(text):
        from .weights import lora_blocks

        lora_blocks.read(blocks)
        return (*read_lora(whole)[:2], blocks)
    file, _, number = text.rpartition(":")
    on_the_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", file) and not exists(text)
    given = file and (exists(file) or on_the_hub)
    if exists(text) or not given:  # a colon can be part of the path
        return text, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(number)):
            return file, weight
    raise ValueError(f"the weight of a LoRA is a number, as in {file}:0.8, not {shown(number)}")


def write_lora(lora: LoRA) -> str:
    """Writes what `read_lora` reads."""
    file, weight, *blocks = lora
    return f"{file}:{weight}" + "".join(f":lbw={one}" for one in blocks)


def read_embedding(text: str) -> tuple[str, str]:
    """zork.pt:creature -> the file and the word for prompts, "" unless the text gives one"""
    file, _, word = text.rpartition(":")
    if exists(text) or not (file and word and exists(file)):  # a colon can be part of the path
        return text, ""
    return file, word


def write_embedding(embedding: tuple[str, str]) -> str:
    """Writes what `read_embedding` reads."""
    file, word = embedding
    return f"{file}:{word}" if word else file


def read_control(text: str) -> Control:
    """net.safetensors=edges.png:0.8:0-0.5 -> the ControlNet, its hint, its weight, and when it works

    The weight is 1 and it works in all steps unless the text says otherwise.
    """
    found = re.fullmatch(rf"(.+?)=(.+?)(?::({NUMBER})(?::({NUMBER})-({NUMBER}))?)?", text)
    if found is None:
        raise ValueError(
            f"a ControlNet and its hint are written like canny.safetensors=edges.png:0.8, not {shown(text)}"
        )
    file, hint, weight, start, end = found.groups()
    return file, hint, float(weight or 1), float(start or 0), float(end or 1)


def write_control(control: Control) -> str:
    """Writes what `read_control` reads."""
    file, hint, *numbers = control
    weight, start, end = map(str, numbers)
    return f"{file}={hint}:{weight}:{start}-{end}"


def read_sides(text: str) -> tuple[int, int, int, int]:
    """right=128,top=64 -> (0, 64, 128, 0)"""
    from .steer.outpaint import read_sides

    return read_sides(text)


def write_sides(sides: tuple[int, int, int, int]) -> str:
    from .steer.outpaint import write_sides

    return write_sides(sides)


def read_image_prompt(text: str) -> ImagePrompt:
    """ip-adapter.bin=cat.png:0.6 -> the IP-Adapter, the picture, and its weight, which is 1 unless said"""
    found = re.fullmatch(rf"(.+?)=(.+?)(?::({NUMBER}))?", text)
    if found is None:
        raise ValueError(
            f"an IP-Adapter and its picture are written like ip-adapter.bin=cat.png:0.6, not {shown(text)}"
        )
    return found[1], found[2], float(found[3] or 1)


def write_image_prompt(prompt: ImagePrompt) -> str:
    """Writes what `read_image_prompt` reads."""
    file, picture, weight = prompt
    return f"{file}={picture}:{weight}"


def read_prediction(text: str) -> str:
    """v -> v_prediction"""
    from .model.prediction import read_prediction

    return read_prediction(text)


# From metadata


def carried_number(value: Any) -> float:
    if isinstance(value, int | float):
        return value
    raise ValueError


def carried_size(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    raise ValueError


def carried_interval(value: Any) -> tuple[float, float]:
    return read_interval(value) if isinstance(value, str) else carried_size(value)


def carried_sides(value: Any) -> tuple[int, int, int, int]:
    if isinstance(value, list) and len(value) == 4 and all(isinstance(one, int) for one in value):
        return value[0], value[1], value[2], value[3]
    raise ValueError


def carried_rows(*kinds: Sequence[type]) -> Callable[[Any], tuple[Any, ...]]:
    """Returns what reads rows of values: each row is of one of these kinds. A float may be a whole number."""

    def fits(row: Any, kind: Sequence[type]) -> bool:
        if not isinstance(row, list) or len(row) != len(kind):
            return False
        allowed = ((int, float) if one is float else (one,) for one in kind)
        return all(type(value) in types for value, types in zip(row, allowed))

    def read(value: Any) -> tuple[Any, ...]:
        if isinstance(value, list) and all(any(fits(row, kind) for kind in kinds) for row in value):
            return tuple(map(tuple, value))
        raise ValueError

    return read
