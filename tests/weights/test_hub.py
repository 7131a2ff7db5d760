"""The hub: a model is fetched without what is not needed, and only for a name that is no file."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from reifusion.model.model_loader import load as load_path
from reifusion.model.tensors import ModelError
from reifusion.weights import hub as hub_module
from reifusion.weights import info, load
from tests.tiny import SMALL, assert_same_networks


class Hub:
    """Stands in for the hub: a repository with both sizes of weights, or no network."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.fetched: list[tuple] = []

    def model_info(self, repository: str, timeout: float) -> SimpleNamespace:
        if self.folder is None:
            raise ConnectionError("no network")
        files = [x.relative_to(self.folder).as_posix() for x in self.folder.rglob("*")]
        names = [*files, "unet/model.fp16.safetensors"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def snapshot_download(self, repository: str, allow_patterns, etag_timeout: float) -> str:
        self.fetched = allow_patterns
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub

    def put(folder: Path | None) -> Hub:
        made = Hub(folder)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        return made

    return put


def cached(folder: Path, hub: Path) -> Path:
    """Puts a folder into the hub's cache as someone/small; returns where it is there."""
    kept = hub / "models--someone--small"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0123456789abcdef")
    return shutil.copytree(folder, kept / "snapshots" / "0123456789abcdef")


def test_only_the_needed_files_of_a_hub_model_are_fetched(hub, folder, models):
    made = hub(folder)
    assert_same_networks(load("someone/small")[1], models)
    weights = {name for name in made.fetched if name.endswith((".safetensors", ".bin"))}
    assert weights == {
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_a_model_in_the_cache_is_loaded_without_asking_the_hub(hub, folder, models, tmp_path):
    hub(None)
    cached(folder, tmp_path / "hub")
    assert_same_networks(load("someone/small")[1], models)


@pytest.mark.parametrize("gone", ["model_index.json", "vae/diffusion_pytorch_model.safetensors"])
def test_a_cache_that_is_not_complete_is_completed(hub, folder, models, tmp_path, gone):
    made = hub(folder)
    (cached(folder, tmp_path / "hub") / gone).unlink()
    assert_same_networks(load("someone/small")[1], models)
    assert made.fetched


def test_no_network_is_said(hub):
    hub(None)
    with pytest.raises(ModelError, match=r"someone/small, and the hub was not reached .* in the local cache"):
        load("someone/small")


@pytest.mark.parametrize("source", ["", "a\0b", "x" * 5000, "a/b/c", "../a", "a/b.ckpt", "https://x.y/z"])
def test_nothing_of_that_name(source, monkeypatch):
    monkeypatch.setattr(hub_module, "_download", lambda *name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(ModelError):
        load(source)


def test_a_path_and_the_mini_do_not_need_the_hub(folder, monkeypatch):
    monkeypatch.setattr(hub_module, "_download", lambda *name: pytest.fail(f"asked the hub for {name}"))
    assert info(folder).config == info(str(folder)).config == SMALL
    assert info("mini").config.name == "mini"


def test_the_loader_itself_does_not_ask_the_hub(monkeypatch):
    monkeypatch.setattr(hub_module, "_download", lambda *name: pytest.fail(f"asked the hub for {name}"))
    with pytest.raises(ModelError, match="there is no file or folder someone/small"):
        load_path("someone/small")


@pytest.mark.parametrize(
    "parts", [("text_encoder", "text_encoder_2"), ("text_encoder_2",)], ids=["base", "refiner"]
)
def test_of_sdxl_every_part_is_fetched_once(parts):
    """As published: beside the folders whole files and halves of them, which are left alone."""
    folders = {part: "model" for part in parts} | {
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
    }
    names = {
        part: [f"{part}/{stem}{variant}.safetensors" for variant in ("", ".fp16")]
        for part, stem in folders.items()
    }
    files = [
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "tokenizer_2/vocab.json",
        "vae_1_0/config.json",
    ]
    files += [name for own in names.values() for name in own]
    wanted = hub_module._wanted(files, "")
    assert sorted(wanted) == sorted(own[0] for own in names.values())


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
def test_for_a_denoiser_alone_the_folder_of_its_family_is_fetched(denoiser):
    parts = [denoiser, "vae", "text_encoder", "text_encoder_2"]
    files = ["model_index.json", *(f"{part}/model.safetensors" for part in parts)]
    assert hub_module._wanted(files, "unet") == [f"{denoiser}/model.safetensors"]
