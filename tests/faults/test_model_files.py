"""Model files as people share them: right, or one sentence that says what is wrong and what to do."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reifusion.cli.main import main
from reifusion.model.config import SD15, SD21, ModelConfig
from reifusion.model.model_converter import convert, load_from_standard_weights, rules
from reifusion.model.model_loader import build
from reifusion.model.tensors import ModelError, TensorFile
from reifusion.model.tokenizer import Tokenizer
from reifusion.model.tokenizer_folder import read_tokenizer, write_tokenizer
from reifusion.weights import Changes, info, load, save
from tests.tiny import SMALL, WORDS, assert_same_networks, native_state, random_networks

DIFFUSERS_TEXT = "text_encoder/config.json"


@pytest.fixture(scope="module")
def single(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save(SMALL, models, path, "compvis", WORDS)
    return path


def changed(
    path: Path, source: Path, more: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> Path:
    """Writes a copy of a file with more tensors, and another header."""
    with safe_open(source, "pt") as file:
        before = file.metadata()
    save_file(load_file(source) | dict(more), path, before if header is None else dict(header))
    return path


def standing_for(path: Path, config: ModelConfig, names: Mapping[str, Tensor] = {}, **header: str) -> Path:
    """Writes a file with the names and shapes of a whole model of that size, in a few bytes."""
    shapes = {f"{net}.{name}": x for net, m in build(config).items() for name, x in m.state_dict().items()}
    content: dict[str, object] = {"__metadata__": header} if header else {}
    end = 0
    for rule in rules(config, "compvis"):
        if rule.ours in shapes:
            for part, shape in zip(rule.theirs, (x.shape for x in rule.split(shapes[rule.ours]))):
                content[part] = {
                    "dtype": "F16",
                    "shape": list(shape),
                    "data_offsets": [end, end + 2 * shape.numel()],
                }
                end += 2 * shape.numel()
    for name in names:
        content[name] = {"dtype": "F16", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(content).encode()
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


# Leftovers


LEFTOVERS = {
    "global_step": torch.tensor(470000),
    "denoiser.sigmas": torch.linspace(0, 14, 1000),
    "optimizer.state.0": torch.ones(3),
    "model.diffusion_model.unheard_of": torch.ones(2),
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_tensor_that_is_no_part_of_the_model_is_named_and_passed_over(
    tmp_path, single, models, name, capsys
):
    path = changed(tmp_path / "x.safetensors", single, {name: LEFTOVERS[name]})
    with pytest.warns(UserWarning, match=f"has a tensor that is no part of the model, {name}"):
        assert_same_networks(load(path)[1], models)
    assert main(["info", str(path)]) == 0
    assert f"not used     1 of its tensors: {name}" in capsys.readouterr().out


def test_the_first_versions_loader_goes_by_the_same_rule(tmp_path, single, models):
    path = changed(tmp_path / "x.safetensors", single, LEFTOVERS)
    with pytest.warns(UserWarning, match="has 4 tensors that are no part of the model, such as "):
        states = load_from_standard_weights(path)
    assert torch.equal(
        states["diffusion"]["conv_out.bias"], models["diffusion"].get_parameter("conv_out.bias")
    )


def test_info_refuses_what_load_refuses(tmp_path, single):
    tensors = load_file(single)
    del tensors["model.diffusion_model.out.2.bias"]
    with safe_open(single, "pt") as file:
        save_file(tensors, tmp_path / "x.safetensors", file.metadata())
    for look in load, info:
        with pytest.raises(ModelError, match="lacks 1 tensors that the model needs, first diffusion"):
            look(tmp_path / "x.safetensors")


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_that_wrappers_have_lengthened_are_known(tmp_path, single, models, before):
    path = changed(tmp_path / "x.safetensors", single, {})
    with safe_open(single, "pt") as file:
        header = file.metadata()
    save_file({f"{before}{name}": x for name, x in load_file(single).items()}, path, header)
    assert_same_networks(load(path)[1], models)


# What the U-Net predicts


@pytest.mark.parametrize(
    "header, tensors, yaml, predicts, known_from",
    [
        ({}, [], "", "epsilon", "nothing in the file says otherwise"),
        ({"modelspec.prediction_type": "v"}, [], "", "v_prediction", "the file's header"),
        ({"modelspec.prediction_type": "epsilon"}, [], "", "epsilon", "the file's header"),
        ({"modelspec.predict_key": "v"}, [], "", "v_prediction", "the file's header"),
        ({}, ["v_pred"], "", "v_prediction", "a tensor v_pred in the file"),
        ({}, ["v_pred", "ztsnr"], "", "v_prediction", "a tensor v_pred in the file"),
        ({}, [], 'model:\n  params:\n    parameterization: "v"\n', "v_prediction", "x.yaml"),
        ({}, [], "model:\n  params:\n    parameterization: eps # ours\n", "epsilon", "x.yaml"),
        ({}, [], "model:\n  target: x\n", "epsilon", "nothing in the file says otherwise"),
    ],
)
def test_the_signs_of_v_prediction_are_read(tmp_path, header, tensors, yaml, predicts, known_from):
    path = standing_for(tmp_path / "x.safetensors", SD15, dict.fromkeys(tensors, torch.ones(0)), **header)
    if yaml:
        path.with_suffix(".yaml").write_text(yaml)
    found = info(path)
    assert (found.config.schedule.prediction_type, found.prediction_known_from) == (predicts, known_from)
    assert found.config.schedule.zero_terminal_snr == ("ztsnr" in tensors)
    assert found.unused == ()


def test_a_sign_that_is_not_understood_is_not_passed_over(tmp_path):
    header: dict[str, Any] = {"modelspec.prediction_type": "x0"}
    path = standing_for(tmp_path / "x.safetensors", SD15, **header)
    with pytest.raises(
        ModelError, match="epsilon, v_prediction or flow, not 'x0'; --prediction-type overrides it"
    ):
        info(path)
    assert info(path, Changes(prediction_type="v")).config.schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", ["single", "folder"])
def test_what_the_user_says_counts(kind, request):
    path = request.getfixturevalue(kind)
    assert info(path).config.schedule.prediction_type == "epsilon"
    for said in "v", "v-prediction", "v_prediction":
        found = info(path, Changes(prediction_type=said))
        assert (found.config.schedule.prediction_type, found.prediction_known_from) == (
            "v_prediction",
            "as you say",
        )


def test_another_prediction_draws_another_picture(tmp_path, folder, capsys):
    drawn = []
    for more in [], ["--prediction-type", "v"], ["--prediction-type=v_prediction"]:
        line = ["generate", "cat", "--model", str(folder), "--steps=2", "--seed=1", "--dtype=fp32", "--quiet"]
        assert main([*line, "--out", str(tmp_path), *more]) == 0
        drawn.append(Path(capsys.readouterr().out.strip()))
    pixels = [path.read_bytes()[-2000:] for path in drawn]
    assert pixels[0] != pixels[1] == pixels[2]
    assert main(["info", str(drawn[1])]) == 0 and "prediction_type v_prediction" in capsys.readouterr().out
    assert main(["generate", "cat", "--prediction-type", "x0"]) == 2
    assert "predicts epsilon, v_prediction or flow, not 'x0'" in capsys.readouterr().err


# Pickles


@pytest.fixture
def lightning() -> Iterator[Any]:
    """Classes of PyTorch Lightning, whose package vanishes before the file is read."""
    module = ModuleType("pytorch_lightning")
    for name, base in ("Callback", object), ("AttributeDict", dict):
        setattr(module, name, type(name, (base,), {"__module__": "pytorch_lightning"}))
    sys.modules["pytorch_lightning"] = module
    yield module
    sys.modules.pop("pytorch_lightning", None)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_training_leaves_beside_the_weights_is_passed_over(tmp_path, lightning, zipped):
    import argparse
    import collections
    import datetime

    weights = {"w": torch.randn(3, 4), "b": torch.zeros(4).half()}
    beside = {
        "scalars": [np.float32(0.1), np.float64(0.2), np.int64(3), np.bool_(True)],
        "arrays": [np.arange(6).reshape(2, 3), np.array(["a"]), np.array([None, "b"], dtype=object)],
        "kinds": [np.dtype("float16"), np.random.get_state()],
        "callbacks": {lightning.Callback: {"best": np.float32(0.1)}, "object": lightning.Callback()},
        "hyper_parameters": lightning.AttributeDict(lr=1e-4, betas=[0.9, 0.999]),
        "more": [argparse.Namespace(lr=1), Path("a"), datetime.datetime(2023, 1, 1), {1, 2}, 3 + 4j],
        "counts": [collections.defaultdict(list, a=[1]), collections.deque([1]), slice(1, 2), range(3)],
    }
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": weights, **beside}, path, _use_new_zipfile_serialization=zipped)
    del sys.modules["pytorch_lightning"]
    found = TensorFile(path)
    assert found.shapes.keys() == weights.keys() and "pytorch_lightning" not in sys.modules
    assert all(torch.equal(found.read(name, "cpu", None), x) for name, x in weights.items())


class Attack:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self) -> tuple:
        return Path.touch, (self.victim,)


class NumPyAttack(Attack):
    def __reduce__(self) -> tuple:
        return np.save, (str(self.victim), 1)


class EvalAttack(Attack):
    def __reduce__(self) -> tuple:
        return eval, (f"open({str(self.victim)!r}, 'w')",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("attack", [Attack, NumPyAttack, EvalAttack])
def test_no_code_is_run_not_even_numpys(tmp_path, attack, zipped):
    path, victim = tmp_path / "x.ckpt", tmp_path / "victim.npy"
    torch.save(
        {"state_dict": {"w": torch.ones(2)}, "x": attack(victim)}, path, _use_new_zipfile_serialization=zipped
    )
    try:
        assert TensorFile(path).shapes.keys() == {"w"}
    except ModelError as error:
        assert "holds code" in str(error)
    path.write_bytes(pickle.dumps({"w": attack(victim)}))
    with pytest.raises(ModelError):
        TensorFile(path)
    assert not victim.exists()


# Numbers


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_read_and_kept(tmp_path, single, dtype):
    small = {name: x.to(dtype) for name, x in load_file(single).items()}
    path = changed(tmp_path / "x.safetensors", single, small)
    assert info(path).dtype == str(dtype).removeprefix("torch.")
    as_float, kept = load(path, dtype=torch.float32)[1], load(path)[1]
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(as_float["diffusion"].get_parameter("conv_out.weight"), small[name].float())
    assert kept["diffusion"].get_parameter("conv_out.weight").dtype == dtype


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_float8_is_read_as_the_weights_that_were_scaled(tmp_path, single, dtype, ending):
    """As ComfyUI writes it: the large weights times a number that makes them fit, and that number beside."""
    state = load_file(single)
    scaled: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(0, dtype=dtype)}
    for name, x in state.items():
        if name.endswith(".weight") and x.ndim > 1 and "embedding" not in name:
            scale = x.abs().max() / torch.finfo(dtype).max
            stem = name.removesuffix("weight")
            scaled |= {
                name: (x / scale).to(dtype),
                stem + ending: scale,
                f"{stem}scale_input": torch.ones(()),
            }
        else:
            scaled[name] = x
    path = changed(tmp_path / "x.safetensors", single, scaled)
    expected, found = load(single)[1], load(path, dtype=torch.float32)[1]
    for part, network in expected.items():
        for name, x in network.named_parameters():
            other = found[part].get_parameter(name)
            limit = 0.13 if dtype == torch.float8_e5m2 else 0.065  # half of the last of 2, or 3, bits
            assert ((x - other).abs() <= limit * x.abs() + 1e-3 * x.abs().max()).all(), name
    kept = load(path)[1]["diffusion"].get_parameter("conv_out.weight")
    assert kept.dtype == torch.float32  # no number of 8 bits without its scale


# Folders of diffusers


def edited(folder: Path, path: Path, part: str, **changes: object) -> Path:
    """A copy of a folder with changes in a config; its weights are links."""
    for file in folder.rglob("*.*"):
        target = path / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    config = path / part
    content = json.loads(config.read_text()) | changes
    config.unlink()
    config.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_block": [1, 1]},
        {"cross_attention_dim": [24, 24]},
        {"attention_head_dim": [4, 4]},
        {"transformer_layers_per_block": [1, 1]},
        {"only_cross_attention": [False, False]},
        {"num_attention_heads": [None, None]},
        {"sample_size": [16, 16]},
    ],
)
def test_one_value_said_for_each_level_is_that_value(tmp_path, folder, changes):
    assert info(edited(folder, tmp_path / "x", "unet/config.json", **changes)).config == replace(
        SMALL, name="x"
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"layers_per_block": [1, 2]},
            r"its unet has layers_per_block = \[1, 2\], where one value is built in",
        ),
        ({"cross_attention_dim": [24, 25]}, "cross_attention_dim = .24, 25., where one value is built in"),
        (
            {"only_cross_attention": [True, False]},
            "only_cross_attention = .True, False., which is not built in",
        ),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "has down_block_types = "),
        ({"down_block_types": None}, "lacks down_block_types"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types that do not fit"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type = 'UNetMidBlock2D', which is not built in"),
        ({"sample_size": [0, "a"]}, "which is no size"),
        ({"layers_per_block": list(range(5000))}, r"layers_per_block = \[0, 1, 2, 3, 4, 5, ...\]"),
    ],
)
def test_a_config_that_is_not_built_in_is_refused_in_a_line(tmp_path, folder, changes, says):
    with pytest.raises(ModelError, match=says) as error:
        info(edited(folder, tmp_path / "x", "unet/config.json", **changes))
    assert len(str(error.value)) < 300 + 2 * len(str(tmp_path))


def test_a_thousand_betas_that_do_not_fit_are_not_printed(tmp_path, folder, capsys):
    betas = np.linspace(1e-4, 0.02, 999).tolist()  # one too few
    path = edited(folder, tmp_path / "x", "scheduler/scheduler_config.json", trained_betas=betas)
    assert main(["info", str(path)]) == 2
    told = capsys.readouterr().err
    assert "trained_betas = [0.0001, " in told and len(told) < 400 and told.count("\n") == 1


def test_a_folder_with_nothing_but_bfloat16_is_read(tmp_path, folder, models):
    path = edited(folder, tmp_path / "x", "unet/config.json")
    for file in list(path.rglob("*.safetensors")):
        file.rename(file.with_suffix(".bf16.safetensors"))
    assert_same_networks(load(path)[1], models)


# Small U-Nets


@pytest.mark.parametrize("levels, attention", [(2, (1, 0)), (2, (1, 1)), (1, (1,))])
@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_a_unet_without_a_middle_is_kept(tmp_path, levels, attention, to):
    small = replace(
        SMALL.unet, channels=SMALL.unet.channels[:levels], heads=(4,) * levels, attention=attention
    )
    config = replace(SMALL, name="x", unet=replace(small, middle=False))
    models, path = random_networks(config), tmp_path / ("x" if to == "diffusers" else "x.safetensors")
    save(config, models, path, to, WORDS)
    found, loaded, _ = load(path)
    assert found == config
    assert_same_networks(loaded, models)


# SD 2.x in one file


def test_sd2_in_one_file_is_recognised(tmp_path):
    more = "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"
    names = [more, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"]
    path = standing_for(tmp_path / "x.safetensors", SD21, dict.fromkeys(names, torch.ones(0)))
    found = info(path)
    assert found.config == SD21 and found.unused == () and "usual for 2.x" in found.prediction_known_from
    said = info(path, Changes(prediction_type="epsilon")).config
    assert (said.size, said.schedule.prediction_type) == (512, "epsilon")


def test_sd2_in_one_file_has_the_names_of_openclip_and_the_weights_of_its_folder(tmp_path):
    config = replace(SMALL, name="two", clip=replace(SMALL.clip, activation="gelu"))
    models = random_networks(config)
    save(config, models, tmp_path / "two.safetensors", "compvis", WORDS)
    save(config, models, tmp_path / "two", "diffusers", WORDS)
    tensors = load_file(tmp_path / "two.safetensors")
    theirs = load_file(tmp_path / "two" / "text_encoder" / "model.safetensors")
    start = "cond_stage_model.model.transformer.resblocks.1"
    heads = [theirs[f"text_model.encoder.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(tensors[f"{start}.attn.in_proj_weight"], torch.cat(heads))
    assert torch.equal(tensors[f"{start}.mlp.c_fc.bias"], theirs["text_model.encoder.layers.1.mlp.fc1.bias"])
    assert not any(name.startswith("cond_stage_model.transformer.") for name in tensors)
    assert_same_networks(load(tmp_path / "two.safetensors")[1], models)
    assert_same_networks(load(tmp_path / "two")[1], models)


def test_a_single_file_that_was_written_before_openclips_names_is_read(tmp_path, single, models):
    config = replace(SMALL, clip=replace(SMALL.clip, activation="gelu"))
    found, loaded, _ = load(single, config=config)
    assert found == config
    assert_same_networks(loaded, models)


# Converting


@pytest.mark.parametrize(
    "channels, opened_by",
    [(4, ""), (9, "Inpaint"), (8, "InstructPix2Pix"), (5, "")],
)
def test_a_folder_says_which_pipeline_opens_it(tmp_path, channels, opened_by):
    config = replace(SMALL, unet=replace(SMALL.unet, in_channels=channels))
    save(config, random_networks(config), tmp_path / "x", "diffusers", WORDS)
    index = json.loads((tmp_path / "x" / "model_index.json").read_text())
    assert index["_class_name"] == f"StableDiffusion{opened_by}Pipeline"


def test_moving_averages_are_taken_when_asked_for(tmp_path, single, models, capsys):
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): x + 1
        for name, x in load_file(single).items()
        if name.startswith("model.")
    }
    both = changed(tmp_path / "both.safetensors", single, averages | {"model_ema.decay": torch.ones(())})
    for flags, more in ([], 0.0), (["--ema"], 1.0):
        target = tmp_path / f"{more}.safetensors"
        assert main(["convert", str(both), str(target), "--to", "native", *flags]) == 0
        loaded = load(target)[1]
        assert torch.equal(
            loaded["diffusion"].get_parameter("conv_out.bias"),
            models["diffusion"].get_parameter("conv_out.bias") + more,
        )
        assert torch.equal(
            loaded["clip"].get_parameter("norm.bias"), models["clip"].get_parameter("norm.bias")
        )
    assert main(["convert", str(single), str(tmp_path / "x.safetensors"), "--to=native", "--ema"]) == 2
    assert "it has no moving average of model.diffusion_model" in capsys.readouterr().err


# Another VAE, another U-Net


def spellings(models: Mapping[str, nn.Module], part: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a VAE or a U-Net in the names in which people share them."""
    native = native_state(dict(models))
    found = {}
    for to, start in ("compvis", "first_stage_model."), ("diffusers", "vae."), ("native", ""):
        if part == "unet":
            start = {"compvis": "model.diffusion_model.", "diffusers": "unet.", "native": "diffusion."}[to]
        keep = ("encoder.", "decoder.") if part == "vae" and to == "native" else (start,)
        own = {name: x for name, x in convert(native, to, SMALL).items() if name.startswith(keep)}
        found[to] = own
        found[f"bare {to}"] = {name.removeprefix(start): x for name, x in own.items()}
    if part == "unet":
        found["ComfyUI"] = {name.removeprefix("model."): x for name, x in found["compvis"].items()}
    return found


@pytest.mark.parametrize("kind", ["single", "folder"])
@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_part_is_taken_from_another_file(tmp_path, kind, part, models, request):
    other = {name: build_like(network) for name, network in models.items()}
    networks = ("encoder", "decoder") if part == "vae" else ("diffusion",)
    for spelling, tensors in spellings(other, part).items():
        path = tmp_path / f"{spelling}.safetensors"
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)
        loaded = load(request.getfixturevalue(kind), changes=Changes(**{part: path}))[1]
        expected = {name: other[name] if name in networks else models[name] for name in models}
        assert_same_networks(loaded, expected)


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_another_u_net_predicts_what_its_own_config_says(tmp_path, single, models, to):
    schedule = replace(SMALL.schedule, prediction_type="v_prediction", zero_terminal_snr=True)
    path = tmp_path / ("v" if to == "diffusers" else "v.safetensors")
    save(replace(SMALL, schedule=schedule), models, path, to, WORDS)
    assert info(single, Changes(unet=path)).config.schedule == schedule
    back = info(path, Changes(unet=single)).config.schedule
    assert (back.prediction_type, back.zero_terminal_snr) == ("epsilon", False)


def build_like(network: nn.Module) -> nn.Module:
    import copy

    with torch.no_grad():
        other = copy.deepcopy(network)
        for parameter in other.parameters():
            parameter.add_(1)
    return other


def test_a_part_is_taken_from_a_folder_and_from_a_whole_model(tmp_path, single, folder, models):
    for source in folder / "vae", folder, single:
        assert_same_networks(load(single, changes=Changes(vae=source))[1], models)


def test_a_file_without_its_vae_is_drawn_with_another(tmp_path, single, models):
    tensors = {name: x for name, x in load_file(single).items() if not name.startswith("first_stage_model.")}
    with safe_open(single, "pt") as file:
        save_file(tensors, tmp_path / "x.safetensors", file.metadata())
    with pytest.raises(ModelError, match="no tensors for the encoder; a file with a VAE is given with --vae"):
        info(tmp_path / "x.safetensors")
    assert_same_networks(load(tmp_path / "x.safetensors", changes=Changes(vae=single))[1], models)


def test_a_part_that_does_not_fit_is_refused(tmp_path, single):
    torch.save({"encoder.down.0.block.0.norm1.weight": torch.ones(3)}, tmp_path / "x.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "y.pt")
    for name, says in ("x.pt", "lacks .* tensors|no tensors for the decoder"), ("y.pt", "y.pt is not a VAE"):
        with pytest.raises(ModelError, match=says):
            load(single, changes=Changes(vae=tmp_path / name))


# Tokenizers


@pytest.mark.parametrize("way", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_learned_word_is_one_token_wherever_it_stands(tmp_path, way):
    write_tokenizer(WORDS, tmp_path)
    n = WORDS.vocab_size
    token = {"content": "<Zork>", "id": n, "normalized": True}
    if way == "vocab.json":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<Zork>": n}))
    elif way == "tokenizer_config.json":
        config = json.loads((tmp_path / way).read_text())
        (tmp_path / way).write_text(json.dumps({**config, "added_tokens_decoder": {str(n): token}}))
    else:
        merges = [list(pair) for pair in WORDS._ranks]
        content = {"model": {"vocab": WORDS.vocabulary, "merges": merges}, "added_tokens": [token]}
        (tmp_path / way).write_text(json.dumps(content))
        (tmp_path / "vocab.json").unlink()
    tokenizer = read_tokenizer(tmp_path, 16)
    cat = WORDS.tokenize("cat")
    assert tokenizer.vocab_size == n + 1
    for text in "cat <Zork> cat", "cat<zork>cat", "CAT <ZORK>  CAT":
        assert tokenizer.tokenize(text) == [*cat, n, *cat]
    assert tokenizer.decode(tokenizer.tokenize("cat <Zork> cat")) == "cat <Zork> cat"
    assert [piece.text for piece in tokenizer.pieces("a <zork>")] == ["a", "<Zork>"]


def test_added_words_survive_every_format(tmp_path):
    n = WORDS.vocab_size
    ids = {**WORDS.vocabulary, "my cat": n, "<Zork>": n + 1, "Exact": n + 2, "é": n + 3}
    tokenizer = Tokenizer(WORDS.merges_text, 16, vocabulary=ids, exact=["Exact"])
    config = replace(SMALL, clip=replace(SMALL.clip, vocab_size=n + 4))
    texts = ["my cat", "MY  Cat exact Exact", "<zork>my catÉ", "<|endoftext|> cat"]
    for to, name in ("native", "a.safetensors"), ("compvis", "b.safetensors"), ("diffusers", "c"):
        save(config, random_networks(config), tmp_path / name, to, tokenizer)
        loaded = load(tmp_path / name)[2]
        assert [loaded.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    text = json.loads((tmp_path / "c" / DIFFUSERS_TEXT).read_text())
    assert (text["bos_token_id"], text["eos_token_id"]) == (tokenizer.start, tokenizer.end)


@pytest.mark.parametrize(
    "added", [{"<zork>": "514"}, {"<zork>": -1}, {"<zork>": None}, {"<zork>": 10**9}, ["x"]]
)
def test_added_tokens_that_make_no_sense_are_refused(tmp_path, folder, added):
    path = edited(folder, tmp_path / "x", "unet/config.json")
    (path / "tokenizer" / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ModelError, match=r"the tokenizer of .*x (cannot be read|knows)"):
        load(path)
