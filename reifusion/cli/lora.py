"""`reifusion lora …`: LoRAs joined, made smaller, put into a model for good, or found between two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import named, writable

app = typer.Typer(
    help="LoRAs: several made one, one made smaller, one put into a model, one taken out of two."
)
Loras = Annotated[list[str], typer.Argument(metavar="LORA[:WEIGHT] …", help="Files, folders or hub ids.")]
Out = Annotated[str, typer.Option("--out", metavar="FILE", help="The .safetensors to write.")]
Rank = Annotated[int, typer.Option(help="At most; less where less is exact.")]


@app.command()
def merge(loras: Loras, out: Out) -> None:
    """Writes one LoRA that changes as much as several together."""
    from ..weights import lora_tools

    with _new(out):
        read = _read(loras)
        if any(blocks for _, _, *blocks in read):
            raise ValueError(
                "block weights need a model: `reifusion lora fuse` knows them, and merge does not"
            )
        lora_tools.write(lora_tools.merge([(lora, weight) for lora, weight, *_ in read]), out)
    print(out)


@app.command()
def resize(lora: Annotated[str, typer.Argument(metavar="LORA")], out: Out, rank: Rank = 8) -> None:
    """Writes the LoRA of a lower rank that is nearest to a given one."""
    from ..weights import lora_tools

    with _new(out):
        ((found, weight, *blocks),) = _read([lora])
        if weight != 1 or blocks:
            raise ValueError("resize takes a LoRA as it is, without a weight; merge writes one with a weight")
        lora_tools.write(lora_tools.resize(found, rank), out)
    print(out)


@app.command()
def extract(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="The model that another one began with.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The other one.")],
    out: Out,
    rank: Rank = 16,
) -> None:
    """Writes the LoRA that leads from one model to another, as nearly as its rank allows."""
    import torch

    from .. import weights
    from ..weights import lora_tools

    with _new(out):
        config, old, _ = weights.load(before, dtype=torch.float32)
        new = weights.load(after, dtype=torch.float32)[1]
        lora_tools.write(lora_tools.extract(old, new, rank, config=config), out)
    print(out)


@app.command()
def fuse(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A file, a folder, a hub id, or mini.")],
    loras: Loras,
    out: Out,
) -> None:
    """Writes a model with LoRAs in its weights, and with the words learned with them, for good."""
    from .. import families, weights
    from ..weights.lora import attach

    with _new(out):
        config, models, tokenizer = weights.load(model)
        pipe = families.family_of(config).pipeline(config)(config, tokenizer, models)
        for lora, weight, *blocks in _read(loras):
            attach(pipe, lora, weight, *blocks)
        weights.save(pipe.config, models, out, "native", pipe.tokenizer, weights.info(model).metadata)
    print(out)


def _new(out: str) -> Any:
    """Makes sure that the file can be written and is not there yet."""
    if not out.endswith(".safetensors"):
        raise ValueError(f"a LoRA or a model is written to a .safetensors file, not to {out}")
    if named(out).exists():
        raise ValueError(f"{out} is there already, and nothing is overwritten")
    return writable(Path(out).parent)


def _read(texts: list[str]) -> list[Any]:
    """Reads LoRAs with their weights, and perhaps block weights, written as for `generate --lora`."""
    from ..spelling import read_lora
    from ..weights import find
    from ..weights.lora import load_lora

    return [(load_lora(find(source, "lora")), *rest) for source, *rest in map(read_lora, texts)]
