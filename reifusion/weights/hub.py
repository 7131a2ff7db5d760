"""The hub: an id, "owner/name", becomes a folder in the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..model import model_loader
from ..model.diffusers_folder import PARTS, weight_files
from ..model.tensors import ModelError


def find(source: str | Path) -> Path:
    """Returns the path of "mini", of a file or folder, or else of a model that is on the hub."""
    try:
        return model_loader.find(source)
    except ModelError:
        is_file = str(source).endswith((".safetensors", ".ckpt", ".pt", ".bin"))
        if not isinstance(source, str) or is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise
    return _download(source)


def _download(repository: str) -> Path:
    """Fetches those files of a repository that are needed. Returns its folder in the local cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repository)
        wanted = [name for part in PARTS for name in weight_files(files, part)]
        return Path(snapshot_download(repository, allow_patterns=[*wanted, "*.json", "tokenizer/*"]))
    except RepositoryNotFoundError:
        raise ModelError(f"there is no file or folder {repository}, and no public model on the hub") from None
    except Exception as error:  # no network, a proxy, a time-out: the exception's class depends on versions
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except Exception:
            why = f"the hub was not reached ({type(error).__name__}) and the model is not in the local cache"
            raise ModelError(f"there is no file or folder {repository}; {why}") from None
