"""Words that were learned: of two text encoders, and in the file of a LoRA."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reifusion.cli.main import main
from reifusion.families.sdxl import StableDiffusionXL
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.settings import Settings
from reifusion.weights import save
from reifusion.weights.inversion import Embedding, load_embedding, save_embedding, teach
from reifusion.weights.lora import attach
from tests.tiny import SMALL, WORDS, networks, random_networks
from tests.tiny_sdxl import TINY

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


@pytest.fixture
def xl() -> StableDiffusionXL:
    return StableDiffusionXL(TINY, WORDS, random_networks(TINY))


def test_sdxl_learns_a_word_in_both_text_encoders(xl, tmp_path):
    first, second = drawn(2, TINY.clip.width), drawn(2, 32)
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "zork.safetensors")
    before = xl.encode_text(["a cat"])
    teach(xl, load_embedding(tmp_path / "zork.safetensors"))
    assert torch.equal(xl.encode_text(["a cat"]), before)
    for name, vectors in ("clip", first), ("clip_2", second):
        assert torch.equal(xl.models[name].embedding.token.weight[-2:], vectors)
        assert getattr(xl.config, name).vocab_size == WORDS.vocab_size + 2
    # The same as a text whose tokens have these vectors in the place of their own
    written = xl.encode_text(["a zork"])
    plain = StableDiffusionXL(TINY, WORDS, copy.deepcopy(random_networks(TINY)))
    cat, dog = WORDS.tokenize("cat dog")
    for name, vectors in ("clip", first), ("clip_2", second):
        plain.models[name].embedding.token.weight.data[[cat, dog]] = vectors  # type: ignore[union-attr]
    assert torch.allclose(written, plain.encode_text(["a cat dog"]), atol=1e-6)


def test_a_word_for_another_number_of_text_encoders_is_refused(xl):
    one = Embedding("zork", drawn(1, TINY.clip.width))
    two = Embedding("zork", drawn(1, SMALL.clip.width), second=drawn(1, 32))
    with pytest.raises(ModelError, match="has vectors for one text encoder, and tiny-xl has more"):
        teach(xl, one)
    with pytest.raises(ModelError, match="has vectors for two text encoders, and small has one"):
        teach(StableDiffusion(SMALL, WORDS, networks(SMALL)), two)
    with pytest.raises(ModelError, match="is for text encoders of 31 numbers a word"):
        teach(xl, Embedding("zork", drawn(1, TINY.clip.width), second=drawn(1, 31)))
    assert xl.tokenizer is WORDS


def test_a_word_for_two_is_written_as_it_is_read(tmp_path):
    word = Embedding("zork", drawn(2, 24), second=drawn(2, 32))
    save_embedding(word, tmp_path / "zork.safetensors")
    again = load_embedding(tmp_path / "zork.safetensors")
    assert again.word == "zork" and again.second is not None and word.second is not None
    assert torch.equal(again.vectors, word.vectors) and torch.equal(again.second, word.second)


def lora(path: Path) -> Path:
    tensors = {
        f"{LAYER}.lora_down.weight": drawn(2, 24), f"{LAYER}.lora_up.weight": drawn(32, 2),
        "bundle_emb.zork.string_to_param.*": 5 * drawn(2, 24),
    }  # fmt: skip
    save_file(tensors, path)
    return path


def test_a_loras_words_can_be_said(tmp_path, capsys):
    save(SMALL, networks(SMALL, noise=0.05), tmp_path / "model.safetensors", tokenizer=WORDS)
    file = lora(tmp_path / "creature.safetensors")
    settings = Settings(
        "a zork", model=str(tmp_path / "model.safetensors"), lora=((str(file), 0.0),), steps=2
    )
    pipe = settings.pipe("cpu")
    assert pipe.tokenizer.vocabulary["zork"] == SMALL.clip.vocab_size
    unknown = Settings(model=settings.model).pipe("cpu")
    assert not torch.allclose(pipe.encode_text(["a zork"]), unknown.encode_text(["a zork"]), atol=1e-3)
    assert torch.equal(pipe.encode_text(["a cat"]), unknown.encode_text(["a cat"]))
    names: dict[str, object] = {}
    exec(settings.as_python().partition("picture =")[0], names)
    assert names["pipe"].tokenizer.vocabulary["zork"] == SMALL.clip.vocab_size  # type: ignore[attr-defined]
    line = ["generate", "a zork", f"--model={settings.model}", f"--lora={file}:0", "--steps=2", "--quiet"]
    assert main([*line, f"--out={tmp_path / 'a.png'}"]) == 0, capsys.readouterr().err


def test_a_word_of_ones_own_goes_before_a_loras(tmp_path):
    pipe = StableDiffusion(SMALL, WORDS, networks(SMALL))
    teach(pipe, Embedding("zork", drawn(1, 24)))
    attach(pipe, lora(tmp_path / "creature.safetensors"))
    attach(pipe, lora(tmp_path / "creature.safetensors"), -1.0)
    assert pipe.config.clip.vocab_size == SMALL.clip.vocab_size + 1
