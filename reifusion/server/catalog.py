"""The models, LoRAs and ControlNets that a request may name.

A name is looked up in the listing of a folder and never becomes a part of a path, so no name leads anywhere
else; a link that leads out of the folder is not listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..model.sentences import shown
from .errors import Refusal

MODELS, LORAS = (".safetensors", ".ckpt"), (".safetensors",)


@dataclass(frozen=True)
class Catalog:
    """One model that is always there, and what lies in two folders."""

    model: str  # a source, as `load` takes it
    models_folder: Path | None = None
    loras_folder: Path | None = None
    controls_folder: Path | None = None

    @property
    def usual(self) -> str:
        """The name of the model that draws when none is named."""
        path = Path(self.model)
        return path.stem if path.suffix in MODELS else path.name

    def models(self) -> dict[str, str]:
        """Returns the models as they are listed now: name -> source."""
        return {self.usual: self.model} | _listed(self.models_folder, MODELS)

    def loras(self) -> dict[str, str]:
        """Returns the LoRAs as they are listed now: name -> file."""
        return _listed(self.loras_folder, LORAS)

    def controls(self) -> dict[str, str]:
        """Returns the ControlNets as they are listed now: name -> file."""
        return _listed(self.controls_folder, MODELS)

    def model_of(self, name: str) -> str:
        """Returns the model's source; the name may have its suffix, or a hash in brackets as A1111 shows it.

        Raises Refusal for a name that is not listed.
        """
        return _found(name, self.models(), "model", "model_not_found")

    def lora_of(self, name: str) -> str:
        """Returns the LoRA's file, in the same way."""
        return _found(name, self.loras(), "lora", "lora_not_found")

    def control_of(self, name: str) -> str:
        """Returns the ControlNet's file, in the same way."""
        return _found(name, self.controls(), "ControlNet", "control_not_found")

    def name_of(self, source: str) -> str:
        """Returns the name for a source, or for the file of a LoRA or a ControlNet."""
        known = self.models() | self.loras() | self.controls()
        return next((name for name, where in known.items() if where == source), Path(source).name)


def _listed(folder: Path | None, suffixes: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in [] if folder is None else sorted(_inside(folder)):
        is_folder = suffixes is MODELS and (path / "model_index.json").is_file()
        if is_folder or (path.suffix in suffixes and path.is_file()):
            name = path.name if is_folder else path.stem
            found[path.name if name in found else name] = str(path)
    return found


def _inside(folder: Path) -> Iterator[Path]:
    """Yields what lies in a folder, without hidden files and links that lead out of it."""
    home = folder.resolve()
    for path in folder.iterdir():
        if not path.name.startswith(".") and path.resolve().is_relative_to(home):
            yield path


def _found(name: str, known: dict[str, str], param: str, code: str) -> str:
    short = re.sub(r"\s*\[\w*\]$", "", name)
    for one in (name, short, re.sub(r"\.(safetensors|ckpt)$", "", short)):
        if one in known:
            return known[one]
    there = ", ".join(known) or "none"
    raise Refusal(404, f"there is no {param} {shown(name)}; there are: {there}"[:500], param, code)
