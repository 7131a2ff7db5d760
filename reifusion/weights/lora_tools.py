"""LoRAs as matrices: several made one, one made smaller, and one found between two models.

All of it rests on ΔW = (α/r) B A, so that other kinds are refused, by name. Source: Hu et al. 2021, Eq. 3;
Eckart & Young 1936 for the best matrix of a lower rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..files import whole
from ..model.config import ModelConfig
from ..model.model_loader import state_dict
from ..model.tensors import ModelError
from .lora import LoRA, _flat, places
from .lora_kinds import Difference, Update
from .writing import write_tensors


def merge(loras: Sequence[tuple[LoRA, float]]) -> LoRA:
    """Returns one LoRA that changes as much as all of these together, each times its weight. Exact.

    Of a layer that two of them change, the rank is the sum of both: w₁B₁A₁ + w₂B₂A₂ = [w₁B₁ w₂B₂] [A₁; A₂].
    Differences of biases add up, and learned words stay, the last of each name. Raises ModelError for LoRAs
    that do not fit together and for other kinds, and ValueError for a weight that is not finite.
    """
    parts: dict[str, list[tuple[LoRA, float, Update]]] = {}
    biases: dict[str, Tensor] = {}
    for lora, weight in loras:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of a LoRA must be a finite number, not {weight}")
        for layer, update in plain(lora).items():
            parts.setdefault(kohya(layer), []).append((lora, weight, update))
        for layer, bias in lora.biases.items():
            change = weight * bias.change.float()
            biases[kohya(layer)] = biases.get(kohya(layer), torch.zeros_like(change)) + change
    updates = {}
    for layer, own in parts.items():
        shapes = {(one.up.shape[0], math.prod(one.down.shape[1:])) for _, _, one in own}
        if len(shapes) > 1:
            paths = " and ".join(dict.fromkeys(lora.path for lora, _, _ in own))
            raise ModelError(f"{paths} are for models of different sizes, as {layer} shows")
        shape = max((one.down.shape[1:] for _, _, one in own), key=len)  # (in,) or (in, k, k)
        downs = [one.down.float().reshape(one.rank, *shape) for _, _, one in own]
        ups = [weight * one.alpha / one.rank * one.up.float().flatten(1) for _, weight, one in own]
        updates[layer] = _update(torch.cat(ups, 1), torch.cat(downs))
    summed = {layer: Difference(change) for layer, change in biases.items()}
    words = {word.word: word for lora, _ in loras for word in lora.words}
    path = " + ".join(lora.path for lora, _ in loras)
    return LoRA(updates, path=path, biases=summed, words=tuple(words.values()))


def resize(lora: LoRA, rank: int) -> LoRA:
    """Returns the LoRA of at most this rank that is nearest to another one, layer by layer.

    Differences of biases and learned words are kept. Raises ModelError for other kinds, and ValueError for a
    rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, not {rank}")
    updates = {}
    for layer, one in plain(lora).items():
        # B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, where the middle is only (r, r): its SVD is that of the whole.
        q_up, r_up = torch.linalg.qr(one.alpha / one.rank * one.up.double().flatten(1))
        q_down, r_down = torch.linalg.qr(one.down.double().flatten(1).T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T)
        updates[kohya(layer)] = _cut(q_up @ u, s, v @ q_down.T, rank, one.down.shape[1:])
    biases = {kohya(layer): x for layer, x in lora.biases.items()}
    return LoRA(updates, path=lora.path, biases=biases, words=lora.words)


def plain(lora: LoRA) -> dict[str, Update]:
    """Returns the updates. Raises ModelError if one of them is not two matrices."""
    for layer, update in lora.updates.items():
        if not isinstance(update, Update):
            raise ModelError(
                f"{lora.path} holds {update.kind}, which is not two matrices, for {layer}; put it into a"
                " model with `reifusion lora fuse`, and take a LoRA out of that with `reifusion lora extract`"
            )
    return {layer: update for layer, update in lora.updates.items() if isinstance(update, Update)}


def extract(
    before: Mapping[str, nn.Module],
    after: Mapping[str, nn.Module],
    rank: int,
    least: float = 1e-6,
    config: ModelConfig | None = None,
) -> LoRA:
    """Returns the LoRA of at most this rank that is nearest to the way from one model to another.

    It has the differences of biases too; norms and embeddings are left out. before, after: models of the same
    sizes, by name ("clip", "diffusion"). least: weights and biases that have changed by a smaller share than
    this are left out. config: as for `lora.apply`. Raises ModelError for models of different sizes, and
    for models that do not differ, and ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of a LoRA must be at least 1, not {rank}")
    sizes = [{key: x.shape for key, x in state_dict(models).items()} for models in (before, after)]
    if sizes[0] != sizes[1]:
        raise ModelError("the two models have different sizes, so no LoRA leads from one to the other")
    if config is None:
        config = ModelConfig(clip=before["clip"].config, unet=before["diffusion"].config)  # type: ignore[arg-type]
    updates, biases = {}, {}
    for place in places(config):
        one, two = (models[place.network].get_submodule(place.layer) for models in (before, after))
        if not isinstance(one, nn.Linear | nn.Conv2d):
            continue
        old, new = (
            cast("Tensor", layer.weight).detach().double().chunk(place.parts)[place.part]
            for layer in (one, two)
        )
        change = new - old
        if one.bias is not None and two.bias is not None:
            was, now = (
                cast("Tensor", layer.bias).detach().double().chunk(place.parts)[place.part]
                for layer in (one, two)
            )
            if (now - was).norm() > least * was.norm():
                biases[kohya(place.diffusers)] = Difference((now - was).float())
        if change.norm() <= least * old.norm():
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        shape = torch.Size((*change.shape[1:], 1, 1)) if place.convolution else change.shape[1:]
        updates[kohya(place.diffusers)] = _cut(u, s, v, rank, shape)
    if not (updates or biases):
        raise ModelError("the two models have the same weights in all layers that a LoRA can change")
    return LoRA(updates, path="the difference", biases=biases)


def kohya(layer: str) -> str:
    """Returns a layer's name as kohya spells it, from any spelling: "lora_unet_mid_block_…"."""
    return "lora_" + re.sub("^text_encoder_", "te_", re.sub(r"^text_encoder_(\d)_", r"te\1_", _flat(layer)))


def _cut(u: Tensor, s: Tensor, v: Tensor, rank: int, shape: torch.Size) -> Update:
    """Keeps the largest singular values; both matrices get the roots of them."""
    kept = max(1, min(rank, int((s > 1e-12 * s[0]).sum())))
    roots = s[:kept].sqrt()
    return _update((u[:, :kept] * roots).float(), (roots[:, None] * v[:kept]).float().reshape(kept, *shape))


def _update(up: Tensor, down: Tensor) -> Update:
    """B (out, r) and A (r, in) or (r, in, k, k), whose product is the change itself: α is r."""
    kernel = [1] * (down.ndim - 2)
    return Update(down.contiguous(), up.reshape(*up.shape, *kernel).contiguous(), float(len(down)))


def write(lora: LoRA, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a LoRA and its words to a `.safetensors` in kohya's layout, whole or not at all.

    Raises ModelError for other kinds.
    """
    tensors: dict[str, Tensor] = {}
    two = any(kohya(layer).startswith("lora_te2_") for layer in (*lora.updates, *lora.biases))

    def spelled(layer: str) -> str:
        name = kohya(layer)
        return name.replace("lora_te_", "lora_te1_") if two else name  # of two text encoders, the first

    for layer, bias in lora.biases.items():
        tensors[f"{spelled(layer)}.diff_b"] = bias.change.float().contiguous()
    for layer, one in plain(lora).items():
        name = spelled(layer)
        tensors |= {
            f"{name}.lora_down.weight": one.down.float().contiguous(),
            f"{name}.lora_up.weight": one.up.float().contiguous(),
            f"{name}.alpha": torch.tensor(float(one.alpha)),
        }
    for word in lora.words:  # as `BUNDLED` reads them
        vectors = {"string_to_param.*": word.vectors}
        if word.second is not None:
            vectors = {"clip_l": word.vectors, "clip_g": word.second}
        tensors |= {f"bundle_emb.{word.word}.{name}": x.float().contiguous() for name, x in vectors.items()}
    with whole(Path(path)) as temporary:
        write_tensors(tensors, temporary, {"format": "pt", **(metadata or {})})
