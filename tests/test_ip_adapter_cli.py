"""IP-Adapters from the command line: drawn with, carried in pictures, repeated, and refused in a sentence."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reifusion import album
from reifusion.api import load
from reifusion.cli import main
from reifusion.weights import save
from reifusion.weights.hub import find_adapter
from tests.parity.test_ip_adapter import picture, write_adapter, write_encoder
from tests.tiny import WORDS, random_networks
from tests.tiny_sdxl import TINY_SD

SMALL = replace(TINY_SD, size=32, steps=3, cfg=3.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, a picture, and an IP-Adapter with its image encoder."""
    home = tmp_path_factory.mktemp("home")
    save(SMALL, random_networks(SMALL), home / "model.safetensors", tokenizer=WORDS)
    write_encoder(home / "image_encoder")
    write_adapter(home / "ip.safetensors", "plain", load(home / "model.safetensors", "cpu", "fp32"))
    picture(1).save(home / "cat.png")
    return home


def draw(home: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Path:
    command = ["generate", "cat", f"--model={home}/model.safetensors", "--seed=1", "--quiet", "--dtype=fp32"]
    code = main([*command, f"--out={home}/out", *more])
    out, error = capsys.readouterr()
    assert code == 0, error
    return Path(out.strip())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_is_a_prompt_and_the_result_says_so(home, capsys, tmp_path, monkeypatch):
    prompt = f"--ip-adapter={home}/ip.safetensors={home}/cat.png"
    plain, drawn = draw(home, capsys), draw(home, capsys, f"{prompt}:0.8")
    assert np.abs(pixels(drawn) - pixels(plain)).max() > 0
    assert np.array_equal(pixels(draw(home, capsys, f"{prompt}:0")), pixels(plain))
    settings = album.read(drawn).settings
    assert settings.ip_adapter == ((f"{home}/ip.safetensors", f"{home}/cat.png", 0.8),)
    again = draw(home, capsys, "--like", str(drawn))
    assert np.array_equal(pixels(again), pixels(drawn))
    assert f"{prompt}:0.8" in settings.as_command().split()
    elsewhere = draw(home, capsys, f"{prompt}:0.8", f"--image-encoder={home}/image_encoder")
    assert np.array_equal(pixels(elsewhere), pixels(drawn))
    monkeypatch.chdir(tmp_path)
    exec(compile(album.read(elsewhere).settings.as_python(), "lines", "exec"), {})
    assert np.array_equal(pixels(Path("picture.png")), pixels(drawn))


def test_a_picture_that_changed_is_noticed(home, capsys, tmp_path):
    prompt = tmp_path / "dog.png"
    picture(2).save(prompt)
    drawn = draw(home, capsys, f"--ip-adapter={home}/ip.safetensors={prompt}")
    picture(3).save(prompt)
    assert main(["generate", "--like", str(drawn), "--quiet", f"--out={home}/out"]) == 0
    assert "IP-Adapter or the picture of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ip-adapter=ip.safetensors"], "are written like"),
        (["--ip-adapter={home}/ip.safetensors={home}/missing.png"], "there is no picture"),
        (["--ip-adapter={home}/missing.safetensors={home}/cat.png"], "there is no file"),
        (["--ip-adapter={home}/model.safetensors={home}/cat.png"], "is not an IP-Adapter"),
        (["--ip-adapter={home}/ip.safetensors={home}/cat.png", "--deepcache=2"], "leaves out"),
        (["--ip-adapter={home}/ip.safetensors={home}/cat.png", "--image-encoder={home}"], "no config.json"),
        (["--image-encoder={home}/image_encoder"], "is for --ip-adapter"),
        (["--control={home}/ip.safetensors={home}/cat.png"], "which has an option of its own"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(home, capsys, more, said):
    given = [text.replace("{home}", str(home)) for text in more]
    code = main(["generate", "cat", f"--model={home}/model.safetensors", f"--out={home}/out", *given])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1, error


def test_an_adapter_that_is_named_as_a_model_is_told_what_it_is(home, tmp_path, capsys):
    save_file({"lycoris_mid_block_resnets_0_conv1.hada_w1_a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    for path, said in (
        (home / "ip.safetensors", "is an IP-Adapter"),
        (tmp_path / "x.safetensors", "is a LoRA"),
    ):
        assert main(["info", str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_metadata_with_odd_image_prompts_is_refused(home, capsys):
    drawn = draw(home, capsys, f"--ip-adapter={home}/ip.safetensors={home}/cat.png")
    carried = json.loads(Image.open(drawn).text["reifusion"])  # type: ignore[attr-defined]
    for odd in ("x", [["a", "b"]], [["a", "b", "1"]], [[1, "b", 1.0]]):
        with pytest.raises(ValueError, match="its ip_adapter is"):
            album.from_carried(carried | {"ip_adapter": odd})


def test_a_file_in_a_repository_is_fetched_with_its_encoder(home, tmp_path, monkeypatch):
    import huggingface_hub

    for name in ("models", "models/image_encoder", "sdxl_models"):
        (tmp_path / name).mkdir()
    os.link(home / "ip.safetensors", tmp_path / "models" / "ip.safetensors")
    asked = []

    def fetch(repository, allow_patterns, etag_timeout, local_files_only):
        asked.append((repository, allow_patterns, local_files_only))
        if local_files_only and len(asked) == 1:
            raise FileNotFoundError("not in the cache")
        (tmp_path / "models" / "image_encoder" / "config.json").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    source = "h94/IP-Adapter/models/ip.safetensors"
    assert find_adapter(source) == tmp_path / "models" / "ip.safetensors"
    wanted = ["models/ip.safetensors", "models/image_encoder/*.json", "models/image_encoder/*.safetensors"]
    assert [one[2] for one in asked] == [True, False] and asked[0][:2] == ("h94/IP-Adapter", wanted)
    assert find_adapter(source) == tmp_path / "models" / "ip.safetensors" and asked[-1][2]  # from the cache
    assert find_adapter(home / "ip.safetensors") == home / "ip.safetensors"
    with pytest.raises(ValueError, match=r"h94/IP-Adapter on the hub does not hold models/no\.bin"):
        find_adapter("h94/IP-Adapter/models/no.bin")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **b: 1 / 0)
    with pytest.raises(ValueError, match=r"no file h94/IP-Adapter/models/no\.bin, and the hub was not"):
        find_adapter("h94/IP-Adapter/models/no.bin")
