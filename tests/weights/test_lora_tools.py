"""LoRAs joined, cut, extracted and put in for good: each held against what applying them does."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from reifusion import cli
from reifusion.model.tensors import ModelError
from reifusion.train.lora import attach, save_lora
from reifusion.train.text2image import TextToImage
from reifusion.weights import load, save
from reifusion.weights.inversion import Embedding
from reifusion.weights.lora import LoRA, apply, load_lora
from reifusion.weights.lora_kinds import Difference, LoHa
from reifusion.weights.lora_tools import extract, kohya, merge, plain, resize, write
from tests.tiny import SMALL, TINY, WORDS, native_state, networks

ALL = ("clip.*attention.*", "diffusion.*attention.*", "diffusion.*conv*", "diffusion.*proj*")


def lora(tmp_path, name: str, rank: int, alpha: float, seed: int, layout="kohya", targets=ALL) -> LoRA:
    model = TextToImage(SMALL)
    parameters = attach(model, rank, alpha, targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    save_lora(model, tmp_path / f"{name}.safetensors", layout)
    return load_lora(tmp_path / f"{name}.safetensors")


def after(*loras) -> dict[str, torch.Tensor]:
    """The weights of a model with these LoRAs."""
    models = networks(SMALL)
    for one, weight in loras:
        apply(models, one, weight)
    return native_state(models)


def assert_near(one, other, rtol=1e-5):
    assert all((one[name] - other[name]).norm() <= rtol * other[name].norm() + 1e-7 for name in other)


def test_a_merged_lora_changes_as_much_as_all_of_them(tmp_path):
    a = lora(tmp_path, "a", 2, 3.0, 0)
    b = lora(tmp_path, "b", 4, 1.0, 1, "peft", ("diffusion.*attention.*",))
    both = merge([(a, 0.7), (b, -1.5)])
    write(both, tmp_path / "both.safetensors")
    read = load_lora(tmp_path / "both.safetensors")
    expected = after((a, 0.7), (b, -1.5))
    assert_near(after((both, 1.0)), expected)
    assert_near(after((read, 1.0)), expected)
    assert {one.rank for one in plain(both).values()} == {2, 6}
    assert any((expected[name] - x).norm() > 0.01 for name, x in native_state(networks(SMALL)).items())


def test_resized_is_exact_where_the_rank_suffices_and_the_nearest_where_not(tmp_path):
    a = lora(tmp_path, "a", 6, 3.0, 0)
    assert_near(after((resize(a, 6), 1.0)), after((a, 1.0)))
    doubled = merge([(a, 1.0), (a, 1.0)])  # of rank 12 on paper, and 6 in truth
    assert max(one.rank for one in plain(resize(doubled, 12)).values()) == 6
    small = resize(a, 2)
    for layer, one in a.updates.items():
        name = kohya(layer)
        whole, cut = (x.delta(torch.zeros(x.shape)).double().flatten(1) for x in (one, small.updates[name]))
        dropped = torch.linalg.svdvals(whole)[2:]
        # Eckart & Young: no matrix of that rank is nearer than the root of the dropped values' squares.
        assert torch.linalg.matrix_rank(cut, rtol=1e-4) <= 2
        assert (whole - cut).norm().item() == pytest.approx(dropped.pow(2).sum().sqrt().item(), rel=1e-3)


def test_what_was_put_into_a_model_can_be_taken_out_again(tmp_path):
    a = lora(tmp_path, "a", 3, 2.0, 0)
    before, tuned = networks(SMALL), networks(SMALL)
    apply(tuned, a, 0.8)
    found = extract(before, tuned, rank=3)
    assert_near(after((found, 1.0)), native_state(tuned), rtol=1e-4)
    assert len(found.updates) == len(a.updates)
    half = extract(before, tuned, rank=1)
    far = [sum((x - y).norm() ** 2 for x, y in zip(after((one, 1.0)).values(), native_state(tuned).values()))
           for one in (found, half)]  # fmt: skip
    assert far[1] > 100 * far[0]


def test_biases_that_differ_are_taken_out_too():
    before, tuned = networks(SMALL), networks(SMALL)
    with torch.no_grad():
        tuned["clip"].get_parameter("layers.0.linear_1.bias").add_(1.0)
    found = extract(before, tuned, rank=2)
    assert not found.updates and len(found.biases) == 1
    assert_near(after((found, 1.0)), native_state(tuned))


def test_learned_words_stay_with_their_lora(tmp_path):
    a = lora(tmp_path, "a", 2, 3.0, 0)
    words = (
        Embedding("zork", torch.arange(48.0).reshape(2, 24), "x"),
        Embedding("glib", torch.ones(1, 24), "x", torch.zeros(1, 32)),
    )
    one, two = (LoRA(a.updates, words=words[:n]) for n in (1, 2))
    assert resize(one, 1).words == words[:1] and merge([(one, 1.0), (two, 0.5)]).words == words
    write(two, tmp_path / "two.safetensors")
    for found, expected in zip(load_lora(tmp_path / "two.safetensors").words, words[::-1], strict=True):
        assert found.word == expected.word and torch.equal(found.vectors, expected.vectors)
        assert (found.second is None) == (expected.second is None)


def test_a_word_is_put_into_the_model_with_its_lora(tmp_path, capsys):
    a = lora(tmp_path, "a", 2, 3.0, 0)
    write(LoRA(a.updates, words=(Embedding("zork", torch.ones(1, 24), "x"),)), tmp_path / "z.safetensors")
    save(SMALL, networks(SMALL), tmp_path / "model.safetensors", "native", WORDS)
    files = [tmp_path / f"{name}.safetensors" for name in ("model", "z", "out")]
    assert run("fuse", *files[:2], "--out", files[2], capsys=capsys) == (0, "")
    _, models, tokenizer = load(files[2])
    (zork,) = tokenizer.tokenize("zork")
    assert torch.equal(models["clip"].get_parameter("embedding.token.weight")[zork], torch.ones(24))


def test_models_between_which_no_lora_leads_are_refused(tmp_path):
    one = networks(SMALL)
    with pytest.raises(ModelError, match="the same weights in all layers"):
        extract(one, copy.deepcopy(one), 4)
    with pytest.raises(ModelError, match="have different sizes"):
        extract(one, networks(TINY), 4)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="rank of a LoRA must be at least 1"):
            resize(lora(tmp_path, "a", 2, 1.0, 0), bad)
    a = lora(tmp_path, "a", 2, 1.0, 0)
    with pytest.raises(ValueError, match="finite number, not nan"):
        merge([(a, float("nan"))])


ONES = (torch.ones(96, 2), torch.ones(2, 24))


def test_biases_are_kept_and_other_kinds_are_refused_by_name(tmp_path):
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    bias = Difference(torch.arange(96.0))
    a = lora(tmp_path, "a", 2, 3.0, 0)
    one = LoRA(a.updates, biases={layer: bias})
    both = merge([(one, 2.0), (LoRA({}, biases={layer: bias}), -0.5)])
    write(both, tmp_path / "both.safetensors")
    read = load_lora(tmp_path / "both.safetensors")
    assert torch.equal(read.biases[layer].change, 1.5 * bias.change)
    assert torch.equal(resize(one, 1).biases[layer].change, bias.change)
    other = LoRA({**a.updates, layer: LoHa(ONES, ONES, 1.0)}, path="x.pt")
    for refused in (lambda: merge([(other, 1.0)]), lambda: resize(other, 1), lambda: write(other, "y")):
        with pytest.raises(ModelError, match=f"x.pt holds a LoHa, .* two matrices, for {layer}; .*fuse"):
            refused()


def run(*arguments, capsys) -> tuple[int, str]:
    code = cli.main(["lora", *map(str, arguments)])
    return code, capsys.readouterr().err


def test_the_commands_do_it_with_files(tmp_path, capsys):
    a, b = lora(tmp_path, "a", 2, 1.0, 0), lora(tmp_path, "b", 2, 1.0, 1)
    save(SMALL, networks(SMALL), tmp_path / "model.safetensors", tokenizer=WORDS, metadata={"mine": "yes"})
    file = {
        name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "model", "ab", "fused", "out", "less")
    }
    given = (f"{file['a']}:0.5", f"{file['b']}")
    assert run("merge", *given, "--out", file["ab"], capsys=capsys) == (0, "")
    assert run("fuse", file["model"], *given, "--out", file["fused"], capsys=capsys) == (0, "")
    assert (
        run("extract", file["model"], file["fused"], "--out", file["out"], "--rank", 4, capsys=capsys)[0] == 0
    )
    assert run("resize", file["ab"], "--rank", 1, "--out", file["less"], capsys=capsys) == (0, "")
    expected = after((a, 0.5), (b, 1.0))
    assert_near(native_state(load(file["fused"])[1]), expected)
    assert_near(after((load_lora(file["ab"]), 1.0)), expected)
    assert_near(after((load_lora(file["out"]), 1.0)), expected, rtol=1e-4)
    assert {x.shape[0] for name, x in load_file(file["less"]).items() if "lora_down" in name} == {1}
    code, said = run("merge", file["a"], "--out", file["ab"], capsys=capsys)
    assert code == 2 and said == f"reifusion: {file['ab']} is there already, and nothing is overwritten\n"
    code, said = run("merge", file["model"], "--out", tmp_path / "x.safetensors", capsys=capsys)
    assert code == 2 and "is not a LoRA" in said and said.count("\n") == 1
    for weighted in (f"{file['a']}:0.5", f"{file['a']}:1:lbw=ALL"):
        code, said = run("resize", weighted, "--out", tmp_path / "x.safetensors", capsys=capsys)
        assert code == 2 and "resize takes a LoRA as it is, without a weight" in said
    code, said = run("resize", file["a"], "--out", tmp_path / "x.txt", capsys=capsys)
    assert code == 2 and "is written to a .safetensors file" in said
