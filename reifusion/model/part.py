"""A VAE or a U-Net in a file of its own, in any of the names in which people share them."""

from __future__ import annotations

import re
from pathlib import Path

from .diffusers_folder import open_folder, open_weights
from .model_converter import LAYOUT, Layout, Rule, match
from .tensors import ModelError, Stored, TensorFile

# The networks of each part, and its spellings: one of the file's names begins like this, and with that before
# it, the name is one that a whole model has.
PARTS = {
    "vae": (
        ("encoder", "decoder"),
        (
            (r"first_stage_model\.|vae\.", ""),
            (r"(en|de)coder\.(mid|(down|up)\.\d+)\.(block|attn)", "first_stage_model."),
            (r"(en|de)coder\.(mid_block|down_blocks|up_blocks)\.", "vae."),
            (r"(en|de)coder\.(down|middle|up)\.", ""),
        ),
    ),
    "unet": (
        ("diffusion",),
        (
            (r"model\.diffusion_model\.|unet\.|diffusion\.", ""),
            (r"diffusion_model\.", "model."),
            (r"input_blocks\.", "model.diffusion_model."),
            (r"down_blocks\.", "unet."),
            (r"down\.", "diffusion."),
        ),
    ),
}


def open_part(
    path: Path, part: str, layout: Layout = LAYOUT
) -> tuple[dict[str, Stored], list[Rule], list[str], dict[str, str]]:
    """Opens the "vae" or the "unet" of a file, or of a folder of diffusers; a whole model will do.

    Returns its tensors, the rules for them, the names that no rule knows, and the file's header. Raises
    ModelError.
    """
    networks, spellings = PARTS[part]
    folder = part
    if part == "unet":
        folder, spellings = layout.denoiser, (*spellings, *layout.alone)
    header: dict[str, str] = {}
    if (path / "model_index.json").is_file():
        tensors = open_folder(path, (folder,))
    elif path.is_dir():
        tensors = open_weights(path)
    else:
        file = TensorFile(path)
        tensors, header = file.tensors(), file.metadata
    found = [before for mark, before in spellings if any(re.match(mark, name) for name in tensors)]
    if part == "unet" and any(name.startswith("controlnet_") for name in tensors):
        raise ModelError(
            f"{path} is a ControlNet, which has the names of a U-Net's first half but is not one"
        )
    if not found:
        raise ModelError(f"{path} is not a {_NAMES[part]}: it has no tensors of one in any names known here")
    whole = {found[0] + name: tensor for name, tensor in tensors.items()}
    _, rules, unknown = match(whole, None, layout)
    own = [rule for rule in rules if rule.ours.split(".")[0] in networks]
    return whole, own, unknown, header


_NAMES = {"vae": "VAE", "unet": "U-Net"}
