"""The hub: an id, "owner/name", becomes a folder in the local cache."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ..families import FAMILIES
from ..model import model_loader
from ..model.diffusers_folder import all_shards, weight_files
from ..model.tensors import ModelError
from .lora import lora_files

SOON = 10  # seconds to wait for an answer


def find(source: str | Path, part: str = "") -> Path:
    """Returns the path of "mini", of a file or folder, or else of what is on the hub.

    part: "vae" or "unet" if the repository may hold that part alone, "lora" or "control" if it is to hold a
    LoRA or a ControlNet.
    """
    try:
        return model_loader.find(source)
    except ModelError:
        if not is_id(source):
            raise
    return _cached(str(source), part) or _download(str(source), part)


def find_adapter(source: str | Path) -> Path:
    """Returns the path of an IP-Adapter's file, or of one in a repository on the hub.

    source: the file, or "h94/IP-Adapter/models/ip-adapter_sd15.safetensors", which is fetched with the image
    encoders that may be meant for it.
    """
    path = Path(source).expanduser()
    found = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+\.(?:safetensors|bin))", str(source))
    if path.exists() or found is None:
        return path
    from huggingface_hub import snapshot_download

    repository, file = found.groups()
    # As there: ViT-H is in `models`, and only the plain one for SDXL needs the other, beside it
    folders = {"models"} if "vit-h" in file else {"models", file.rpartition("/")[0] or "."}
    wanted = [f"{folder}/image_encoder/{kind}" for folder in folders for kind in ("*.json", "*.safetensors")]
    for offline in (True, False):  # what was fetched once is found without asking
        try:
            folder = Path(
                snapshot_download(
                    repository, allow_patterns=[file, *wanted], etag_timeout=SOON, local_files_only=offline
                )
            )
        except Exception as error:  # as in `_download`
            if not offline:
                raise ModelError(f"there is no file {source}, and {_why(error)}") from None
            continue
        if (folder / file).is_file() and (not offline or any(folder.glob("*/image_encoder/config.json"))):
            return folder / file
    raise ModelError(f"{repository} on the hub does not hold {file}")


def is_id(source: str | Path) -> bool:
    """True if the text may be the id of a repository, and not a file."""
    is_file = str(source).endswith((".safetensors", ".ckpt", ".pt", ".bin"))
    return isinstance(source, str) and not is_file and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source))


def _wanted(files: Collection[str], part: str) -> list[str]:
    """Picks the files with weights that are needed; [] if a part has none."""
    if part == "lora":
        return lora_files(files)
    if (part and (alone := weight_files(files))) or part == "control":
        return alone
    folders = {name.split("/")[0] for name in files}
    family = model_loader.family_of(files, {}, FAMILIES)
    parts = [name for name in family.folders if name in folders]
    if part:
        parts = [family.layout.denoiser if part == "unet" else part]
    chosen = [weight_files(files, name) for name in parts]
    whole = part or len(parts) > 2  # a text encoder, a VAE and a denoiser
    return [name for names in chosen for name in names] if whole and all(chosen) else []


def _cached(repository: str, part: str) -> Path | None:
    """Returns the repository's folder in the local cache if all that is needed is there.

    The hub is not asked then, so a model that was fetched once is loaded at once, and without a network.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    with suppress(OSError):
        folder = cache / "snapshots" / (cache / "refs" / "main").read_text().strip()
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        wanted = _wanted(files, part)
        if wanted and all_shards(wanted) and (part or "model_index.json" in files):
            return folder
    return None


def _download(repository: str, part: str) -> Path:
    """Fetches those files of a repository that are needed. Returns its folder in the local cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # every attempt of several would be told on stderr
    try:
        files = [one.rfilename for one in HfApi().model_info(repository, timeout=SOON).siblings or ()]
        if wanted := _wanted(files, part):
            patterns = [*wanted, "*.json", "tokenizer*/*"]
            return Path(snapshot_download(repository, allow_patterns=patterns, etag_timeout=SOON))
    except Exception as error:  # no network, a proxy, a time-out: the exception's class depends on versions
        raise ModelError(f"there is no file or folder {repository}, and {_why(error)}") from None
    needed = {
        "": "a model in the folders of diffusers",
        "lora": "one LoRA",
        "control": "a ControlNet",
        "vae": "a VAE",
        "unet": "a U-Net",
    }
    raise ModelError(f"{repository} on the hub does not hold {needed[part]}")


def _why(error: Exception) -> str:
    """Says why the hub did not give a model that is not in the local cache."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        return "on the hub it is for those who accepted its terms there and ran: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "no public model on the hub"
    if isinstance(error, OfflineModeIsEnabled):
        return "it is not in the local cache, and HF_HUB_OFFLINE forbids to ask the hub"
    status = getattr(getattr(error, "response", None), "status_code", None)
    how = f"answered {status}" if status else f"was not reached ({type(error).__name__})"
    return f"the hub {how} and the model is not in the local cache"
