"""Files: what was saved is loaded again, in any format, and what is wrong with one is said in a sentence."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reifusion.model import model_loader, tensors
from reifusion.model.config import SD15, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.diffusers_folder import weight_files
from reifusion.model.model_converter import convert, load_from_standard_weights
from reifusion.model.model_loader import build, info, load, preload_models_from_standard_weights
from reifusion.model.tensors import ModelError
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import save
from tests.tiny import assert_same_networks, native_state, random_networks

TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(width=8, layers=2, heads=2),
    vae=VAEConfig(channels=(4, 8, 12), layers=1, groups=2),
    unet=UNetConfig(
        channels=(4, 8, 12), attention=(0, 1, 1), layers=1, heads=(2, 2, 2), context_width=8, groups=2
    ),
)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return random_networks(TINY)


@pytest.fixture(scope="module")
def native(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model.safetensors"
    save(TINY, models, path)
    return path


@pytest.fixture(scope="module")
def folder(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diffusers") / "tiny"
    save(TINY, models, path, to="diffusers")
    return path


def fails(source: str | Path, match: str, config: ModelConfig | None = None) -> None:
    """Loading fails, and says so in one sentence that names the file."""
    with pytest.raises(ModelError, match=match) as caught:
        load(source, config=config)
    message = str(caught.value)
    assert str(source) in message and "\n" not in message and not message.endswith(".")


# There and back


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded(tmp_path, to, dtype):
    models = random_networks(TINY, dtype)
    path = tmp_path / ("tiny" if to == "diffusers" else "tiny.safetensors")
    save(TINY, models, path, to)
    config, loaded, tokenizer = load(path)
    assert config == TINY
    assert_same_networks(loaded, models)
    assert tokenizer.encode("a small cat") == Tokenizer().encode("a small cat")
    assert not any(module.training for module in loaded.values())
    assert not any(x.is_meta for module in loaded.values() for x in [*module.parameters(), *module.buffers()])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_converted_while_loading(native, models, dtype):
    _, loaded, _ = load(native, dtype=dtype)
    assert_same_networks(loaded, {name: build_like(module, dtype) for name, module in models.items()})


def build_like(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(module).to(dtype)


def test_the_seeds_two_functions(native, models):
    assert_same_networks(preload_models_from_standard_weights(native, "cpu"), models)
    states = load_from_standard_weights(native, "cpu")
    assert list(states) == ["clip", "encoder", "decoder", "diffusion"]
    for name, module in build(TINY).items():
        module.load_state_dict(states[name], assign=True)


def test_an_own_vocabulary_is_kept(tmp_path):
    tokenizer = Tokenizer("a b\nab c</w>\n")
    config = replace(TINY, clip=replace(TINY.clip, vocab_size=tokenizer.vocab_size, context_length=16))
    for to, name in ("native", "a.safetensors"), ("compvis", "b.safetensors"), ("diffusers", "folder"):
        save(config, random_networks(config), tmp_path / name, to, tokenizer)
        loaded_config, _, loaded = load(tmp_path / name)
        assert loaded_config.clip == config.clip
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.end == tokenizer.end and loaded.pad == tokenizer.pad
        assert loaded.encode("abc cab") == Tokenizer("a b\nab c</w>\n", context_length=16).encode("abc cab")


def test_another_padding_and_order_of_the_vocabulary_are_kept(tmp_path):
    """SD 2.x pads with "!"; and a vocabulary's ids need not be in the order of its merges."""
    ids = {token: 513 - i for i, token in enumerate(Tokenizer("").vocabulary)}
    tokenizer = Tokenizer("", 16, vocabulary=ids, pad="!")
    config = replace(TINY, clip=replace(TINY.clip, vocab_size=600, context_length=16))
    for to, name in ("native", "a.safetensors"), ("compvis", "b.safetensors"), ("diffusers", "folder"):
        save(config, random_networks(config), tmp_path / name, to, tokenizer)
        assert load(tmp_path / name)[2].encode("a cat!") == tokenizer.encode("a cat!")


@pytest.mark.parametrize(
    "header", [{"tokenizer": "a b\nc"}, {"pad": "?!?"}, {"vocabulary": "{"}, {"vocabulary": "3"}]
)
def test_a_tokenizer_that_cannot_be_read(tmp_path, native, header):
    with safe_open(native, "pt") as file:
        save_file(load_file(native), tmp_path / "x.safetensors", file.metadata() | header)
    fails(tmp_path / "x.safetensors", "the tokenizer of .* cannot be read")


def test_a_folder_without_its_tokenizer(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    shutil.rmtree(path / "tokenizer")
    fails(
        path,
        "the tokenizer of .* cannot be read: .* has neither vocab.json and merges.txt nor tokenizer.json",
    )


def test_a_tokenizer_with_more_tokens_than_the_text_encoder(tmp_path):
    config = replace(TINY, clip=replace(TINY.clip, vocab_size=600))
    models, path = random_networks(config), tmp_path / "x.safetensors"
    with pytest.raises(ModelError, match="the text encoder has fewer tokens than the tokenizer"):
        save(config, models, path)
    save(config, models, path, tokenizer=Tokenizer(""))
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["tokenizer"]
    save_file(load_file(path), path, header)
    fails(path, "the tokenizer of .* knows 49408 tokens, its text encoder 600")


def test_the_header_says_that_the_file_is_a_lora(tmp_path, models):
    save(TINY, models, tmp_path / "x.safetensors", metadata={"trained on": "cats"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["format"] == "reifusion" and header["trained on"] == "cats"
    assert json.loads(header["config"])["unet"]["channels"] == [4, 8, 12]
    assert "tokenizer" not in header  # the standard vocabulary is not stored
    assert info(tmp_path / "x.safetensors").metadata == {"trained on": "cats"}


def test_info_reads_no_weights(native, folder, models, monkeypatch):
    monkeypatch.setattr(tensors.TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    numbers = {name: sum(p.numel() for p in module.parameters()) for name, module in models.items()}
    for path, format in (native, "native"), (folder, "diffusers"):
        found = info(path)
        assert (found.format, found.config, found.dtype, found.parameters) == (
            format,
            TINY,
            "float32",
            numbers,
        )
        assert found.size > 4 * sum(numbers.values())


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model", "model.safetensors"])
def test_content_counts_and_not_the_name(tmp_path, models, native, name):
    path = tmp_path / name
    torch.save(convert(native_state(models), "compvis"), path)
    assert_same_networks(load(path, config=TINY)[1], models)
    path.write_bytes(native.read_bytes())
    assert_same_networks(load(path)[1], models)


# Checkpoints of others


def lightning_objects() -> dict[str, object]:
    """What PyTorch Lightning leaves beside the weights: objects of its own classes, as keys and as values."""
    module = type(sys)("pytorch_lightning")
    made = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning"})
    module.ModelCheckpoint = made  # type: ignore[attr-defined]
    sys.modules["pytorch_lightning"] = module
    callback = made()
    callback.monitor = "val/loss"
    return {"epoch": 3, "global_step": 470000, "callbacks": {made: {"best": 1.0}}, "object": callback}


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoints(tmp_path, models, zipped):
    path = tmp_path / "model.ckpt"
    state = convert(native_state(models), "compvis") | {
        "betas": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
    }
    torch.save({"state_dict": state, "global_step": 1}, path, _use_new_zipfile_serialization=zipped)
    assert_same_networks(load(path, config=TINY)[1], models)


def test_objects_of_lightning_do_not_come_to_life(tmp_path, models):
    path = tmp_path / "model.ckpt"
    try:
        torch.save({"state_dict": convert(native_state(models), "compvis")} | lightning_objects(), path)
    finally:
        del sys.modules["pytorch_lightning"]
    assert_same_networks(load(path, config=TINY)[1], models)
    assert "pytorch_lightning" not in sys.modules


class Attack:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path, models, zipped):
    path, victim = tmp_path / "model.ckpt", tmp_path / "was here"
    state = {"state_dict": convert(native_state(models), "compvis"), "hyper_parameters": Attack(victim)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    fails(path, r"holds code \(.*\) beside its tensors and was not opened")
    path.write_bytes(pickle.dumps(Attack(victim)))
    fails(path, "was not opened|is not a checkpoint")
    assert not victim.exists()


@pytest.mark.parametrize("in_channels", [4, 8, 9])
def test_sd1_is_recognised_by_its_shapes(tmp_path, in_channels):
    path = sparse_sd1(tmp_path / "sd.safetensors", "F16", in_channels)
    found = info(path)
    assert found.format == "compvis" and found.dtype == "float16"
    assert found.config == replace(SD15, unet=replace(SD15.unet, in_channels=in_channels))
    assert found.parameters["diffusion"] == 859_520_964 + (in_channels - 4) * 9 * 320
    assert sum(found.parameters.values()) == 1_066_235_307 + (in_channels - 4) * 9 * 320


def sparse_sd1(path: Path, dtype: str, in_channels: int = 4) -> Path:
    """A file with a published checkpoint's names and shapes; its gigabytes of zeros take no room on disk."""
    width = {"F16": 2, "F32": 4}[dtype]
    header, end = {}, 0
    manifest = json.loads(Path(__file__).with_name("sd-v1-manifest.json").read_text())
    for name, (shape, _) in manifest.items():
        if name == "model.diffusion_model.input_blocks.0.0.weight":
            shape = [320, in_channels, 3, 3]
        start, end = end, end + width * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's measure of memory")
@pytest.mark.parametrize("stored", ["F16", "F32"])
def test_loading_sd1_needs_little_more_memory_than_its_weights(tmp_path, stored):
    path = sparse_sd1(tmp_path / "sd.safetensors", stored)
    assert peak_memory(path, "torch.float16") < 1.3 * 2 * 1_066_235_307


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's measure of memory")
def test_loading_a_pickle_needs_little_more_memory_than_its_weights(tmp_path):
    path = tmp_path / "sd.ckpt"
    config = replace(SD15, unet=replace(SD15.unet, channels=(320, 640), attention=(1, 0), heads=(8, 8)))
    native = {
        f"{net}.{k}": torch.zeros(x.shape)
        for net, m in build(config).items()
        for k, x in m.state_dict().items()
    }
    size = sum(x.numel() for x in native.values())
    torch.save({"state_dict": convert(native, "compvis")}, path)
    config_code = (
        "replace(SD15, unet=replace(SD15.unet, channels=(320, 640), attention=(1, 0), heads=(8, 8)))"
    )
    assert 2 * size > 500e6
    assert peak_memory(path, "torch.float16", config_code) < 1.3 * 2 * size


def peak_memory(path: Path, dtype: str, config: str = "None") -> int:
    """Bytes by which loading a file raises the peak of a fresh process."""
    code = f"""
import resource, torch
from dataclasses import replace
from reifusion.model.config import SD15
from reifusion.model.model_loader import load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.zeros(10).half().sum()
before = peak()
kept = load({str(path)!r}, dtype={dtype}, config={config})
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(result.stdout)


# What is wrong with a file


def test_missing_file(tmp_path):
    fails(tmp_path / "none.safetensors", "there is no file or folder")
    fails("none/none.safetensors", "there is no file or folder")


def test_missing_mini(tmp_path, monkeypatch):
    monkeypatch.setattr(model_loader, "MINI_PATH", tmp_path / "mini.safetensors")
    with pytest.raises(ModelError, match="the mini's weights are not part of this installation"):
        load("mini")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>Not found</html>", "is not a checkpoint"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265380512\n",
            "is a Git LFS pointer",
        ),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a checkpoint"),
        (b"PK\x03\x04" + bytes(100), "is cut off or damaged"),
        (struct.pack("<Q", 10**9) + b'{"a": 1}', "is cut off or damaged"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "is cut off or damaged"),
        (pickle.dumps([1, 2, 3], protocol=2), "is not a checkpoint"),
    ],
)
def test_not_a_checkpoint(tmp_path, content, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    fails(path, match)


def test_pickle_without_names(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(torch.ones(3), path)
    fails(path, "holds no tensors by name")
    torch.save({"weights": [1, 2, 3]}, path)
    fails(path, "not the tensors of a Stable Diffusion model")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999))
def test_a_file_cut_off_anywhere(tmp_path, native, share):
    content = native.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    fails(path, "cut off or damaged|is empty|is not a checkpoint")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.9999))
def test_a_pickle_cut_off_anywhere(tmp_path, share):
    path = tmp_path / "cut.ckpt"
    torch.save({"model.diffusion_model.out.2.weight": torch.ones(9)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    fails(path, "cut off or damaged|is empty|is not a checkpoint")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 30_000), byte=st.integers(0, 255))
def test_a_damaged_header_is_a_model_error_or_harmless(tmp_path, native, place, byte):
    content = bytearray(native.read_bytes())
    content[place] = byte
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        load(path)
    except ModelError as error:
        assert "\n" not in str(error)


def changed(native: Path, path: Path, change: Callable[[dict], object]) -> Path:
    """A copy of a file after a change to its tensors."""
    tensors = load_file(native)
    change(tensors)
    with safe_open(native, "pt") as file:
        save_file(tensors, path, file.metadata())
    return path


def test_wrong_shape_names_tensor_file_and_both_shapes(tmp_path, native):
    name = "diffusion.middle.0.conv_1.weight"
    path = changed(native, tmp_path / "x.safetensors", lambda x: x.update({name: torch.ones(12, 5, 3, 3)}))
    fails(path, rf"tensor {name} in .*x\.safetensors has shape \(12, 5, 3, 3\), but needs \(12, 12, 3, 3\)")


def test_wrong_shape_of_a_part_of_a_fused_tensor(tmp_path, models):
    state = convert(native_state(models), "compvis")
    name = "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.v_proj.weight"
    state[name] = torch.ones(8, 9)
    torch.save(state, tmp_path / "x.ckpt")
    fails(tmp_path / "x.ckpt", rf"tensor {name} in .* has shape \(8, 9\), but needs \(8, 8\)", TINY)


def test_missing_tensors_are_counted_and_the_first_is_named(tmp_path, native):
    gone = ["clip.norm.bias", "diffusion.middle.0.conv_1.weight"]
    path = changed(native, tmp_path / "x.safetensors", lambda x: [x.pop(name) for name in gone])
    fails(path, r"lacks 2 tensors that the model needs, first clip\.norm\.bias")


def test_missing_network_is_named(tmp_path, native):
    path = changed(
        native,
        tmp_path / "x.safetensors",
        lambda x: [x.pop(name) for name in list(x) if name.startswith("decoder.")],
    )
    fails(path, "there are no tensors for the decoder")


def test_extra_tensors_are_counted_and_one_is_named(tmp_path, native, models):
    extra = {"diffusion.extra.weight": torch.ones(2), "unheard.of": torch.ones(2)}
    path = changed(native, tmp_path / "x.safetensors", lambda x: x.update(extra))
    with pytest.warns(
        UserWarning, match="has 2 tensors that are no part of the model, such as diffusion.extra"
    ):
        assert_same_networks(load(path)[1], models)
    assert info(path).unused == ("diffusion.extra.weight", "unheard.of")


def test_a_config_of_the_future(tmp_path, native):
    with safe_open(native, "pt") as file:
        config = json.loads(file.metadata()["config"])
    for text in (json.dumps(config | {"third_eye": True}), "{", "[]", json.dumps(config | {"vae": None})):
        header = {"format": "reifusion", "config": text}
        save_file(load_file(native), tmp_path / "x.safetensors", header)
        fails(tmp_path / "x.safetensors", "a config that this version does not understand")


def test_a_config_of_some_other_program_does_not_count(tmp_path, native, models):
    save_file(load_file(native), tmp_path / "x.safetensors", {"config": '{"lr": 1e-4}'})
    fails(tmp_path / "x.safetensors", "it has the shapes of no known model")


def test_whole_numbers_are_no_weights(tmp_path, native):
    name = "diffusion.conv_out.bias"
    path = changed(native, tmp_path / "x.safetensors", lambda x: x.update({name: torch.ones(4).int()}))
    fails(path, f"tensor {name} in .* holds no floating-point numbers")


def test_parameters_in_a_pickle(tmp_path, models):
    """`state_dict(keep_vars=True)`: some save parameters, which carry their gradients' history."""
    state = {f"{net}.{k}": x for net, m in models.items() for k, x in m.state_dict(keep_vars=True).items()}
    torch.save(state, tmp_path / "x.pt")
    _, loaded, _ = load(tmp_path / "x.pt", config=TINY)
    assert_same_networks(loaded, models)
    assert all(p.is_leaf for module in loaded.values() for p in module.parameters())


def test_a_config_that_makes_no_model(tmp_path, native):
    with safe_open(native, "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["vae"]["groups"] = 7
    save_file(load_file(native), tmp_path / "x.safetensors", {"config": json.dumps(config)})
    fails(
        tmp_path / "x.safetensors",
        r"describes no possible model: num_channels \(4\) must be divisible",
    )


def test_unusual_shapes_need_a_config(tmp_path, native, models):
    save_file(load_file(native), tmp_path / "x.safetensors")
    fails(tmp_path / "x.safetensors", "it has the shapes of no known model")
    assert_same_networks(load(tmp_path / "x.safetensors", config=TINY)[1], models)


@pytest.mark.parametrize(
    "name, match",
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "is Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.context_block.attn.proj.weight", "is a diffusion transformer"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "is a LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "is a LoRA"),
        ("control_model.input_hint_block.0.weight", "is a ControlNet"),
        ("model.diffusion_model.label_emb.weight", "is told more than words"),
        ("model.diffusion_model.label_emb.0.0.weight", "is a U-Net of Stable Diffusion XL alone"),
        ("embedder.model.visual.class_embedding", "is unCLIP"),
        ("emb_params", "is a learned word, which --embedding takes"),
        ("clip_g", "is a learned word"),
    ],
)
def test_relatives_are_recognised(tmp_path, name, match):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2), "model.diffusion_model.out.2.bias": torch.ones(4)}, path)
    fails(path, match)


# Folders of diffusers


def test_a_folder_of_something_else(tmp_path):
    fails(tmp_path, "is not a folder of diffusers: it has no model_index.json")


def test_a_folder_without_its_vae(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    fails(path, "lacks files with the weights of its vae")


def test_a_folder_without_a_shard(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    whole = path / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    fails(path, "lacks files with the weights of its unet")


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_folder_with_broken_json(tmp_path, folder, content):
    path = shutil.copytree(folder, tmp_path / "x")
    (path / "unet" / "config.json").write_text(content)
    fails(path, "config.json is missing or is not JSON")


def test_a_folder_that_draws_otherwise(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps(config | {"class_embed_type": "timestep"}))
    fails(path, "its unet has class_embed_type = 'timestep', which is not built in")


def test_a_folder_of_sdxl(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    shutil.copytree(path / "text_encoder", path / "text_encoder_2")
    fails(path, "is Stable Diffusion XL")


def test_prediction_type_and_noise_come_from_the_scheduler(tmp_path, folder):
    path = shutil.copytree(folder, tmp_path / "x")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction", "beta_end": 0.02})
    )
    schedule = info(path).config.schedule
    assert (schedule.prediction_type, schedule.beta_end) == ("v_prediction", 0.02)


@pytest.mark.parametrize(
    "files, chosen",
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], ["pytorch_model.bin"]),
        (
            [
                "model-00002-of-00002.safetensors",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["model.fp16-00001-of-00001.safetensors"], ["model.fp16-00001-of-00001.safetensors"]),
        (["model.bf16.safetensors", "pytorch_model.bin"], ["model.bf16.safetensors"]),
        (["model.non_ema.safetensors", "config.json", "flax_model.msgpack"], []),
    ],
)
def test_which_files_of_a_component_are_read(files, chosen):
    names = [f"unet/{name}" for name in files] + ["vae/model.safetensors", "unet/extra/model.safetensors"]
    assert weight_files(names, "unet") == [f"unet/{name}" for name in chosen]
