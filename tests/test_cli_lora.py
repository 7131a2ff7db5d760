"""`reifusion generate --lora`: drawing, remembering, repeating and refusing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from reifusion import cli
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import save
from tests.tiny import networks

TOKENIZER = Tokenizer("c a\nca t</w>\n", context_length=8)
TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=TOKENIZER.vocab_size, context_length=8, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=8),
)
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(TINY, networks(TINY), path, tokenizer=TOKENIZER)
    return str(path)


def lora(name: str, seed: int, width: int = 32) -> None:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, width, generator=generator), torch.randn(32, 2, generator=generator)
    save_file({f"{LAYER}.lora_down.weight": down, f"{LAYER}.lora_up.weight": up}, name)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lora("zork.safetensors", 1)
    lora("blot.safetensors", 2)


@pytest.fixture
def run(capsys, model):
    def run(*arguments: object) -> tuple[int, str, str]:
        words = ["generate", "--model", model, "--steps", 1, "--seed", 3, "--dtype", "fp32", *arguments]
        return cli.main([str(word) for word in words]), *capsys.readouterr()

    return run


@pytest.fixture
def draw(run):
    def draw(*arguments: object) -> Path:
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        return Path(out.strip())

    return draw


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def settings(path: Path) -> dict:
    return json.loads(Image.open(path).info["reifusion"])


def test_a_lora_changes_the_picture_as_much_as_its_weight_says(draw):
    plain = pixels(draw("a cat"))
    none, little, full = (
        pixels(draw("a cat", "--lora", f"zork.safetensors{weight}")) for weight in (":0", ":0.1", "")
    )
    assert np.array_equal(none, plain)
    assert 0 < abs(little - plain).sum() < abs(full - plain).sum()
    assert np.array_equal(full, pixels(draw("a cat", "--lora", "zork.safetensors:1.0")))
    assert not np.array_equal(full, pixels(draw("a cat", "--lora", "zork.safetensors:-1")))


def test_several_loras_add_up_in_any_order(draw):
    one, two = "zork.safetensors:0.5", "blot.safetensors"
    both = pixels(draw("a cat", "--lora", one, "--lora", two))
    assert abs(both - pixels(draw("a cat", "--lora", two, "--lora", one))).max() <= 1
    assert not np.array_equal(both, pixels(draw("a cat", "--lora", two)))


def test_a_picture_remembers_its_loras_and_like_repeats_them(draw, run):
    path = draw("a cat", "--lora", "zork.safetensors:0.5", "--lora", "blot.safetensors")
    assert settings(path)["lora"] == [["zork.safetensors", 0.5], ["blot.safetensors", 1.0]]
    assert all(re.fullmatch("[0-9a-f]{10}", digest) for digest in settings(path)["lora_hash"])
    again = draw("--like", path)
    assert np.array_equal(pixels(again), pixels(path))
    assert settings(again) == settings(path)
    other = draw("--like", path, "--lora", "zork.safetensors")
    assert settings(other)["lora"] == [["zork.safetensors", 1.0]]
    assert len(settings(other)["lora_hash"]) == 1


def test_other_programs_find_the_loras_where_they_look(draw):
    path = draw("a cat", "--lora", "zork.safetensors:0.5", "--lora", "blot.safetensors")
    digests = settings(path)["lora_hash"]
    first, last = Image.open(path).info["parameters"].splitlines()
    assert first == "a cat <lora:zork:0.5> <lora:blot:1>"
    assert f'Lora hashes: "zork: {digests[0]}, blot: {digests[1]}"' in last


def test_like_says_when_a_lora_has_changed(draw, run):
    path = draw("a cat", "--lora", "zork.safetensors")
    lora("zork.safetensors", 5)
    code, _, err = run("--like", path)
    assert code == 0
    assert err == "reifusion: the LoRA zork.safetensors is not what it was, so the picture will differ\n"


def test_a_colon_may_be_part_of_the_name(draw):
    lora("a:0.5", 1)
    path = draw("a cat", "--lora", "a:0.5", "--lora", "a:0.5:0.25")
    assert settings(path)["lora"] == [["a:0.5", 1.0], ["a:0.5", 0.25]]


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("missing.safetensors", "missing.safetensors"),
        ("missing.safetensors:0.5", "missing.safetensors:0.5"),
        ("zork.safetensors:strong", "a number, as in zork.safetensors:0.8, not 'strong'"),
        ("zork.safetensors:nan", "not 'nan'"),
        ("zork.safetensors:", "not ''"),
        ("text.safetensors", "text.safetensors is not a checkpoint"),
        ("wide.safetensors", r"shape (32, 48, 1, 1), and the model's is (32, 32, 1, 1)"),
        (".", "."),
    ],
)
def test_a_wrong_lora_is_one_sentence_and_exit_code_2(run, which, says):
    Path("text.safetensors").write_text("hello")
    lora("wide.safetensors", 1, width=48)
    before = sorted(Path().rglob("*"))
    code, out, err = run("a cat", "--lora", which)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"reifusion: [^\n]+\n", err) and says in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "odd", [["zork.safetensors"], [["zork.safetensors"]], [[1, 1]], [["x", "1"]], [["x", True]]]
)
def test_a_picture_with_odd_loras_is_refused(run, odd):
    chunks = PngInfo()
    chunks.add_text("reifusion", json.dumps({"prompt": "a cat", "lora": odd}))
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunks)
    code, _, err = run("--like", "odd.png")
    assert code == 2 and "its lora is" in err
