"""BK-SDM: Stable Diffusion 1.x and 2.x with every second residual block taken out, and then more.

"base" has lost these blocks alone, "small" the middle too, and "tiny" the lowest level as well.
Kim et al. 2023, "BK-SDM: A Lightweight, Fast, and Cheap Version of Stable Diffusion", arXiv:2305.15798.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..model.config import SD15, SD21, ModelConfig
from ..model.tensors import Stored


def _without(whole: ModelConfig, name: str, levels: int = 4, middle: bool = False) -> ModelConfig:
    """Returns a model with one residual block a level, that many levels, and perhaps no middle."""
    unet = whole.unet
    unet = replace(
        unet,
        channels=unet.channels[:levels],
        attention=unet.attention[:levels],
        heads=unet.heads[:levels],
        layers=1,
        middle=middle,
        middle_attention=int(middle),
    )
    return replace(whole, name=name, unet=unet)


# The second generation was made of the model for 512×512, which predicts the noise.
_SD21_BASE = replace(SD21, size=512, schedule=SD15.schedule)
PRESETS = tuple(
    _without(whole, f"bk-sdm-{version}{kind}", levels, middle)
    for whole, version in ((SD15, ""), (_SD21_BASE, "v2-"))
    for kind, levels, middle in (("base", 4, True), ("small", 4, False), ("tiny", 3, False))
)

ROW = re.compile(r"(model\.diffusion_model\.)(input_blocks|output_blocks|up_blocks)\.(\d+)\.(.+)")


def completed(path: Path, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """A file's tensors under the usual names.

    The usual converter from folders to single files counts three rows a level, though here there are two, and
    leaves the names of attention at the lowest level as they are in the folder.
    """
    rows = {found[2] + found[3] for name in tensors if (found := ROW.match(name))}
    if not {"input_blocks1", "input_blocks3"} <= rows or "input_blocks2" in rows:
        return tensors
    return {_usual(name, tensors): tensor for name, tensor in tensors.items()}


def _usual(name: str, names: dict[str, Stored]) -> str:
    """output_blocks.4.0.in_layers.0.weight -> output_blocks.3.0.in_layers.0.weight"""
    if (found := ROW.match(name)) is None:
        return name
    start, side, number, rest = found.groups()
    if side == "up_blocks":  # .0.attentions.1.norm.weight
        _, own, layer = rest.split(".", 2)
        return f"{start}output_blocks.{own}.1.{layer}"
    level, row_of_three = divmod(int(number) - (side == "input_blocks"), 3)
    row = 2 * level + min(row_of_three, 1) + (side == "input_blocks")
    if side == "output_blocks" and row_of_three == 2:  # the layer that grows, alone in a row
        attends = any(
            f"{start}{place}.norm.weight" in names
            for place in (f"output_blocks.{3 * level + 1}.1", f"up_blocks.{level}.attentions.1")
        )
        rest = re.sub(r"^\d+", "2" if attends else "1", rest)
    return f"{start}{side}.{row}.{rest}"
