"""Block weights: how much of a LoRA goes into each block of the U-Net, as A1111's users write it.

`factors` reads a list of numbers, or the name of one, as the extension sd-webui-lora-block-weight does: BASE
for the text encoders, then IN00, IN01, … for the rows on the way down, M00 for the middle, and OUT00, …
for those on the way up. A long list has all rows, 26 numbers for Stable Diffusion 1.x and 2.x and 20 for
SDXL; a short one has those with attention, 17 and 12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from torch import nn

from ..model.diffusion import AttentionBlock, UNet

# Short lists for Stable Diffusion 1.x and 2.x, by that program's names: BASE, six rows down, M00, nine up
PRESETS = {
    "INS": "1 111000 0 000000000",
    "IND": "1 000111 0 000000000",
    "INALL": "1 111111 0 000000000",
    "MIDD": "1 000111 1 111100000",
    "OUTD": "1 000000 0 111100000",
    "OUTS": "1 000000 0 000011111",
    "OUTALL": "1 000000 0 111111111",
}
EVERYWHERE = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}  # of any model


def read(text: str) -> str | tuple[float, ...]:
    """Reads "MIDD" or "1,0,0.5,…": the name, or the numbers. Raises ValueError, in one sentence."""
    if text in PRESETS or text in EVERYWHERE:
        return text
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(math.isfinite, numbers)):
        names = ", ".join([*EVERYWHERE, *PRESETS])
        raise ValueError(f"block weights are numbers with commas between them, or one of {names}: not {text}")
    return numbers


def factors(blocks: str | Sequence[float], unet: nn.Module) -> dict[str, float]:
    """Returns the number of each block of that U-Net, by the block's name; of one that is not listed, 0.

    blocks: the numbers, or text as for `read`. Raises ValueError if they are not those of this U-Net.
    """
    given = read(blocks) if isinstance(blocks, str) else tuple(blocks)
    if not isinstance(unet, UNet):
        raise ValueError("block weights are for models with a U-Net, and this one has none")
    sides: dict[str, Iterable[nn.Module]] = {"IN": unet.down, "M": [unet.middle], "OUT": unet.up}
    rows = {f"{side}{i:02}": row for side, rows in sides.items() for i, row in enumerate(rows)}
    names = ["BASE", *rows]
    short = ["BASE"]
    for name, row in rows.items():
        if name == "M00" or any(isinstance(layer, AttentionBlock) for layer in row.children()):
            short.append(name)
    if isinstance(given, str):
        if given in EVERYWHERE:
            return dict.fromkeys(names, EVERYWHERE[given])
        numbers = [float(digit) for digit in PRESETS[given].replace(" ", "")]
        if len(short) != len(numbers):
            raise ValueError(
                f"{given} is for Stable Diffusion 1.x and 2.x; this model has {len(short)} blocks"
            )
        return dict.fromkeys(names, 0.0) | dict(zip(short, numbers))
    if not all(map(math.isfinite, given)):
        raise ValueError("block weights must be finite numbers")
    if len(given) not in (len(short), len(names)):
        text = f"{len(short)} (those of {', '.join(short)}) or {len(names)}"
        raise ValueError(f"there are {len(given)} block weights, and this model takes {text}")
    listed = names if len(given) == len(names) else short
    return dict.fromkeys(names, 0.0) | dict(zip(listed, given))


def block_of(network: str, layer: str) -> str:
    """Returns the name of the block that a layer is in; "" for what the U-Net has around its blocks.

    network, layer: our names, "diffusion" and "down.1.1.proj_in".
    """
    if network != "diffusion":
        return "BASE"
    if found := re.match(r"(down|up)\.(\d+)\.", layer):
        return f"{'IN' if found[1] == 'down' else 'OUT'}{int(found[2]):02}"
    return "M00" if layer.startswith("middle.") else ""
