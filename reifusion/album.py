"""Pictures with their settings: a PNG that says how it was drawn, for us and for other programs.

An entry is what a picture's file says: `entry` makes one, `save` writes it with the picture, `read` reads it
back. Beside the settings, an entry has the hashes of the files that the settings name, so `warn_if_changed`
can tell whether the same settings still draw the same picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__, a1111, comfyui, weights
from .files import named, put, scratch, whole
from .model.pictures import read_picture
from .model.pipeline import StableDiffusion
from .model.request import Request
from .model.sentences import shown
from .settings import Settings, from_carried
from .weights.hub import find_adapter

# The settings that name files.
FILES = ("model", "lora", "embedding", "vae", "unet", "refiner", "code", "init_image", "mask", "control",
         "ip_adapter", "image_encoder")  # fmt: skip
SEVERAL = ("lora", "embedding", "control", "ip_adapter")  # of which there can be more than one


@dataclass(frozen=True)
class Entry:
    """What a picture's file says about the picture."""

    settings: Settings
    hashes: dict[str, Any]  # of the files, by setting: a text, and for the LoRAs a list of texts
    model_name: str = ""
    ours: bool = True  # False for another program's, which does not say where the model is
    manner: str | None = None  # that program, as `--manner` names it

    def drawn_in(self) -> str | None:
        """Returns the manner in which the picture was drawn: the program's own, or that of the settings."""
        return self.manner or self.settings.manner

    def carried(self) -> dict[str, Any]:
        """Returns the entry as the file carries it, in JSON."""
        said: dict[str, Any] = {}
        for name, value in self.settings.carried().items():
            said[name] = value if self.ours or name != "model" else self.model_name
            if name in self.hashes:
                said[f"{name}_hash"] = self.hashes[name]
        return said


def entry(settings: Settings, request: Request, pipe: StableDiffusion) -> Entry:
    """Returns the entry for a request's first picture. settings: the model, files and shortcuts behind it."""
    dtype = str(pipe.dtype).removeprefix("torch.")
    settings = replace(settings.filled(settings.completed(request, pipe.config)), dtype=dtype)
    return Entry(settings, _hashes(settings), pipe.config.name)


def save(picture: Image.Image, entry: Entry, path: Path) -> Path:
    """Writes the picture to the path, or to path-2, path-3, … if the path is taken; returns where it is."""
    with scratch(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks(entry))
        return put(temporary, path)


def chunks(entry: Entry) -> PngInfo:
    """Returns the entry as a PNG holds it: as text for other programs, and in JSON."""
    texts = PngInfo()
    # A prompt that was not UTF-8 on the command line must not fail here, when the work is done.
    text = a1111.write(entry.settings, entry.model_name, entry.hashes["model"], entry.hashes.get("lora", ()))
    texts.add_text("parameters", text.encode("utf-8", "replace").decode("utf-8"))
    said = {"version": __version__, **entry.carried(), "model_name": entry.model_name}
    texts.add_text("reifusion", json.dumps(said))
    return texts


def read(path: str | Path) -> Entry:
    """Reads the entry of a picture: one drawn here, by ComfyUI, or by what writes as AUTOMATIC1111's does.

    Raises ValueError, in one sentence, for other files.
    """
    texts = getattr(read_picture(path), "text", {})
    if "reifusion" not in texts and "parameters" in texts:
        return _foreign(path, texts["parameters"])
    if "reifusion" not in texts and "prompt" in texts:
        try:
            return Entry(*comfyui.read(texts["prompt"]), ours=False, manner="comfyui")
        except ValueError as error:
            raise ValueError(f"{path} carries a graph, but no settings that can be read: {error}") from None
    try:
        carried = json.loads(texts["reifusion"])
        hashes = {name: carried[f"{name}_hash"] for name in FILES if carried.get(f"{name}_hash") is not None}
        model_name = str(carried.get("model_name", ""))
    except (KeyError, ValueError, RecursionError, AttributeError):
        raise ValueError(f"{path} carries no settings of reifusion's") from None
    for name, value in hashes.items():
        whole_list = isinstance(value, list) and all(isinstance(one, str) for one in value)
        if not (whole_list if name in SEVERAL else isinstance(value, str)):
            raise ValueError(f"{path} carries settings, but its {name}_hash is {shown(value)}")
    try:
        return Entry(from_carried(carried), hashes, model_name)
    except ValueError as error:
        raise ValueError(f"{path} carries settings, but {error}") from None


def _foreign(path: str | Path, text: str) -> Entry:
    """Reads the text of another program, which names the model but not the model's file."""
    try:
        settings, facts = a1111.read(text)
    except ValueError as error:
        raise ValueError(f"{path} carries a text, but no settings that can be read: {error}") from None
    hashes = {"model": facts["Model hash"]} if "Model hash" in facts else {}
    version = facts.get("Version", "")
    manner = None if version.startswith("reifusion") else "sdcpp" if ".cpp" in version else "a1111"
    return Entry(settings, hashes, facts.get("Model", ""), ours=False, manner=manner)


def warn_if_changed(before: Entry, now: Entry, names: Collection[str] = FILES) -> None:
    """Warns of files that have changed since a picture was drawn. names: the settings to look at."""
    for name in FILES:
        if name in names and name in before.hashes and before.hashes[name] != now.hashes.get(name):
            value = getattr(now.settings, name)
            which = " or ".join(one[0] for one in value) if name in SEVERAL else value
            titles = {
                "lora": "LoRA",
                "control": "ControlNet or the hint of",
                "ip_adapter": "IP-Adapter or the picture of",
            }
            what = titles.get(name, name.replace("_", " "))
            warnings.warn(f"the {what} {which} is not what it was, so the picture will differ", stacklevel=2)


def _hashes(settings: Settings) -> dict[str, Any]:
    """Returns the hashes of the files that the settings name, by setting."""
    found: dict[str, Any] = {"model": file_hash(weights.find(settings.model))}
    if settings.lora:
        found["lora"] = [file_hash(weights.find(file, "lora")) for file, *_ in settings.lora]
    if settings.embedding:
        found["embedding"] = [file_hash(weights.find(file)) for file, _ in settings.embedding]
    if settings.control:
        found["control"] = [
            f"{file_hash(weights.find(file, 'control'))}-{file_hash(hint)}"
            for file, hint, *_ in settings.control
        ]
    if settings.ip_adapter:
        found["ip_adapter"] = [
            f"{file_hash(find_adapter(file))}-{file_hash(picture)}"
            for file, picture, _ in settings.ip_adapter
        ]
        if settings.image_encoder:
            found["image_encoder"] = file_hash(settings.image_encoder)
    for part in ("vae", "unet"):
        if source := getattr(settings, part):
            found[part] = file_hash(weights.find(source, part))
    if settings.refiner:
        found["refiner"] = file_hash(weights.find(settings.refiner))
    for name in ("code", "init_image", "mask"):
        if path := getattr(settings, name):
            found[name] = file_hash(path)
    return found


def file_hash(source: str | Path) -> str:
    """Returns ten digits of the SHA-256 of a file, or of a folder's weights, as other programs show it."""
    path = Path(source)
    files = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    return _hash(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@lru_cache(maxsize=64)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of files as they are now, by the times they were written: large ones take seconds."""
    digest = hashlib.sha256()
    for file, _, _ in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:10]


def keep(picture: Image.Image, folder: Path) -> str:
    """Writes an input picture once, named by its content, for settings to refer to; returns its path."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    path = folder / f"input-{hashlib.sha256(stream.getvalue()).hexdigest()[:10]}.png"
    if not path.exists():
        with whole(path) as temporary:
            temporary.write_bytes(stream.getvalue())
    return str(path)


# Names


def file_name(settings: Settings) -> str:
    """'A cat, stretching', seed 7 -> 'a-cat-stretching-7.png'"""
    return f"{slug(settings.prompt or '')}-{settings.seed}.png"


def slug(prompt: str) -> str:
    """'A cat, stretching' -> 'a-cat-stretching'"""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:50].strip("-") or "picture"


def png_path(out: str) -> Path | None:
    """Returns the file that `out` names; None for a folder. Raises ValueError for formats other than PNG."""
    path = named(out)
    if path.suffix == "" or path.is_dir() or out.endswith(("/", os.sep)):
        return None
    if path.suffix.lower() != ".png":
        raise ValueError(f"pictures are written as .png, not as {path.suffix}")
    return path
