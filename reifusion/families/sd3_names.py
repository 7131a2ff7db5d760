"""The names of Stable Diffusion 3's tensors: ours, those of Stability's single files, and diffusers's.

`TABLE` is read as the one in `model/model_converter.py`, with one sign more: at a ⇅, diffusers keeps the two
halves of the tensor, shift and scale, in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.model_converter import Block, Rule

TABLE = """
ours                    single file                         diffusers

[mmdit]
patches                 x_embedder.proj                     pos_embed.proj
time.0                  t_embedder.mlp.0                    time_text_embed.timestep_embedder.linear_1
time.2                  t_embedder.mlp.2                    time_text_embed.timestep_embedder.linear_2
pooled.0                y_embedder.mlp.0                    time_text_embed.text_embedder.linear_1
pooled.2                y_embedder.mlp.2                    time_text_embed.text_embedder.linear_2
words                   context_embedder                    context_embedder
modulation              final_layer.adaLN_modulation.1      ⇅norm_out.linear
out                     final_layer.linear                  proj_out

[pixels]
modulation              x_block.adaLN_modulation.1          norm1.linear
queries.qkv             x_block.attn.qkv                    attn.to_{q,k,v}
queries.norm_q          x_block.attn.ln_q                   attn.norm_q
queries.norm_k          x_block.attn.ln_k                   attn.norm_k
queries.out             x_block.attn.proj                   attn.to_out.0
second.qkv              x_block.attn2.qkv                   attn2.to_{q,k,v}
second.norm_q           x_block.attn2.ln_q                  attn2.norm_q
second.norm_k           x_block.attn2.ln_k                  attn2.norm_k
second.out              x_block.attn2.proj                  attn2.to_out.0
linear_1                x_block.mlp.fc1                     ff.net.0.proj
linear_2                x_block.mlp.fc2                     ff.net.2

[words]
modulation              context_block.adaLN_modulation.1    norm1_context.linear
queries.qkv             context_block.attn.qkv              attn.add_{q,k,v}_proj
queries.norm_q          context_block.attn.ln_q             attn.norm_added_q
queries.norm_k          context_block.attn.ln_k             attn.norm_added_k
queries.out             context_block.attn.proj             attn.to_add_out
linear_1                context_block.mlp.fc1               ff_context.net.0.proj
linear_2                context_block.mlp.fc2               ff_context.net.2

[last words]
modulation              context_block.adaLN_modulation.1    ⇅norm1_context.linear
queries.qkv             context_block.attn.qkv              attn.add_{q,k,v}_proj
queries.norm_q          context_block.attn.ln_q             attn.norm_added_q
queries.norm_k          context_block.attn.ln_k             attn.norm_added_k

[table]
-                       -                                   -

[t5]
embedding               shared                              shared
norm                    encoder.final_layer_norm            encoder.final_layer_norm

[t5 first layer]
bias                    SelfAttention.relative_attention_bias  SelfAttention.relative_attention_bias

[t5 layer]
norm_1                  layer.0.layer_norm                  layer.0.layer_norm
attention.qkv           layer.0.SelfAttention.{q,k,v}       layer.0.SelfAttention.{q,k,v}
attention.out           layer.0.SelfAttention.o             layer.0.SelfAttention.o
norm_2                  layer.1.layer_norm                  layer.1.layer_norm
gate                    layer.1.DenseReluDense.wi_0         layer.1.DenseReluDense.wi_0
linear_1                layer.1.DenseReluDense.wi_1         layer.1.DenseReluDense.wi_1
linear_2                layer.1.DenseReluDense.wo           layer.1.DenseReluDense.wo
"""


@dataclass(frozen=True)
class Swapped(Rule):
    """A rule for a tensor whose two halves are in the other order in the files."""

    def merge(self, parts: list[Tensor]) -> Tensor:
        return _swapped(parts[0])

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [_swapped(tensor)]


def _swapped(tensor: Tensor) -> Tensor:
    """[scale; shift] -> [shift; scale], and back: (2·width, …)"""
    return torch.cat(tensor.chunk(2)[::-1])


def mmdit_blocks(layers: int) -> Iterator[Block]:
    """Yields the blocks of the transformer."""
    ours, single, folder = "diffusion", "model.diffusion_model", "transformer"
    yield "mmdit", ours, single, folder
    yield "table", f"{ours}.position", f"{single}.pos_embed", f"{folder}.pos_embed.pos_embed"
    for i in range(layers):
        theirs = f"{single}.joint_blocks.{i}", f"{folder}.transformer_blocks.{i}"
        yield "pixels", f"{ours}.blocks.{i}.pixels", *theirs
        yield "last words" if i == layers - 1 else "words", f"{ours}.blocks.{i}.words", *theirs


def t5_blocks(layers: int, ours: str, single: str, folder: str) -> Iterator[Block]:
    """Yields the blocks of T5, whose names begin like that."""
    yield "t5", ours, single, folder
    first = "encoder.block.0.layer.0"
    yield "t5 first layer", ours, f"{single}.{first}", f"{folder}.{first}"
    for i in range(layers):
        theirs = f"encoder.block.{i}"
        yield "t5 layer", f"{ours}.layers.{i}", f"{single}.{theirs}", f"{folder}.{theirs}"


def expand(blocks: Iterator[Block], column: int) -> Iterator[Rule]:
    """Yields the rules of blocks for a column of `TABLE`: 1 is the single file, 2 is diffusers."""
    sections = {}
    for section in TABLE.split("\n[")[1:]:
        kind, rows = section.split("]", 1)
        sections[kind] = [row.split() for row in rows.splitlines() if row]
    for kind, *names in blocks:
        for row in sections[kind]:
            theirs, make = row[column], Swapped if "⇅" in row[column] else Rule
            stack = re.search(r"\{(.*)\}", theirs)
            parts = [theirs.replace(stack[0], x) for x in stack[1].split(",")] if stack else [theirs]
            parts = [f"{names[column]}.{part.lstrip('⇅')}".removesuffix(".-") for part in parts]
            for suffix in ("",) if row[0] == "-" else (".weight", ".bias"):
                ours = f"{names[0]}.{row[0]}".removesuffix(".-")
                yield make(ours + suffix, tuple(part + suffix for part in parts))
