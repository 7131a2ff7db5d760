"""The names of Stable Diffusion 3's tensors: ours, those of Stability's single files, and diffusers's."""

from __future__ import annotations

from collections.abc import Iterator

from ..model import model_converter
from ..model.model_converter import Block
from .mmdit import MMDiTConfig

# Read as the table that it goes on from. At a ⇅, diffusers keeps the two halves of a tensor, shift and scale,
# in another order than we and Stability.
TABLE = (
    model_converter.TABLE
    + """
[mmdit]
patches                 x_embedder.proj                     pos_embed.proj
time.0                  t_embedder.mlp.0                    time_text_embed.timestep_embedder.linear_1
time.2                  t_embedder.mlp.2                    time_text_embed.timestep_embedder.linear_2
pooled.0                y_embedder.mlp.0                    time_text_embed.text_embedder.linear_1
pooled.2                y_embedder.mlp.2                    time_text_embed.text_embedder.linear_2
words                   context_embedder                    context_embedder
modulation              final_layer.adaLN_modulation.1      norm_out.linear⇅
out                     final_layer.linear                  proj_out
position                pos_embed                           pos_embed.pos_embed       tensor

[pixels]
modulation              x_block.adaLN_modulation.1          norm1.linear
queries.qkv             x_block.attn.qkv                    attn.to_{q,k,v}
queries.out             x_block.attn.proj                   attn.to_out.0
linear_1                x_block.mlp.fc1                     ff.net.0.proj
linear_2                x_block.mlp.fc2                     ff.net.2

[words]
modulation              context_block.adaLN_modulation.1    norm1_context.linear
queries.qkv             context_block.attn.qkv              attn.add_{q,k,v}_proj
queries.out             context_block.attn.proj             attn.to_add_out
linear_1                context_block.mlp.fc1               ff_context.net.0.proj
linear_2                context_block.mlp.fc2               ff_context.net.2

[last words]
modulation              context_block.adaLN_modulation.1    norm1_context.linear⇅
queries.qkv             context_block.attn.qkv              attn.add_{q,k,v}_proj

[norms]
pixels.queries.norm_q   x_block.attn.ln_q                   attn.norm_q
pixels.queries.norm_k   x_block.attn.ln_k                   attn.norm_k
words.queries.norm_q    context_block.attn.ln_q             attn.norm_added_q
words.queries.norm_k    context_block.attn.ln_k             attn.norm_added_k

[second]
qkv                     x_block.attn2.qkv                   attn2.to_{q,k,v}
out                     x_block.attn2.proj                  attn2.to_out.0

[second norms]
norm_q                  x_block.attn2.ln_q                  attn2.norm_q
norm_k                  x_block.attn2.ln_k                  attn2.norm_k

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

[pooled text]
projection              text_projection                     text_projection
"""
)


def mmdit_blocks(config: MMDiTConfig) -> Iterator[Block]:
    """Yields the blocks of the transformer."""
    yield "mmdit", "diffusion", "model.diffusion_model", "transformer"
    for i in range(config.layers):
        ours = f"diffusion.blocks.{i}"
        theirs = f"model.diffusion_model.joint_blocks.{i}", f"transformer.transformer_blocks.{i}"
        yield "pixels", f"{ours}.pixels", *theirs
        yield "last words" if i == config.layers - 1 else "words", f"{ours}.words", *theirs
        if config.qk_norm:
            yield "norms", ours, *theirs
        if i in config.dual_attention:
            yield "second", f"{ours}.pixels.second", *theirs
            if config.qk_norm:
                yield "second norms", f"{ours}.pixels.second", *theirs


def t5_blocks(layers: int, ours: str, single: str, folder: str) -> Iterator[Block]:
    """Yields the blocks of T5, whose names begin like that."""
    yield "t5", ours, single, folder
    first = "encoder.block.0.layer.0"
    yield "t5 first layer", ours, f"{single}.{first}", f"{folder}.{first}"
    for i in range(layers):
        theirs = f"encoder.block.{i}"
        yield "t5 layer", f"{ours}.layers.{i}", f"{single}.{theirs}", f"{folder}.{theirs}"
