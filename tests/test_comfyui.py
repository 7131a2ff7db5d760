"""ComfyUI's graphs: the settings around the sampler that made the picture."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reifusion import album, comfyui
from reifusion.settings import Settings

GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_sde",
            "scheduler": "karras", "denoise": 1, "model": ["11", 0],
            "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5-pruned.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (cat:1.2)", "clip": ["11", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["11", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "one.safetensors", "strength_model": 0.5, "model": ["4", 0]},
    },
    "11": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "two.safetensors", "strength_model": 1, "model": ["10", 0]},
    },
}  # fmt: skip
SETTINGS = Settings(
    "a (cat:1.2)", "text, watermark", lora=(("one.safetensors", 0.5), ("two.safetensors", 1.0)),
    sampler="dpmpp_2s_sde", schedule="karras", steps=20, cfg=8.0, seed=156680208700286, size=(512, 768),
)  # fmt: skip


def test_the_usual_graph_is_read():
    assert comfyui.read(json.dumps(GRAPH)) == (SETTINGS, {}, "v1-5-pruned.safetensors")


@pytest.mark.parametrize("place", ["style\\", "style/", "/home/someone/", "C:\\style\\"])
def test_a_lora_has_its_name_and_no_place(place):
    graph = json.loads(json.dumps(GRAPH))
    graph["10"]["inputs"]["lora_name"] = f"{place}one.safetensors"
    assert comfyui.read(json.dumps(graph))[0].lora == SETTINGS.lora


def test_a_second_pass_hides_the_first_sampler_and_values_come_from_nodes_of_their_own():
    graph = json.loads(json.dumps(GRAPH))
    graph["20"] = {
        "class_type": "LatentUpscale",
        "inputs": {"samples": ["3", 0], "width": 1024, "height": 1024},
    }
    graph["21"] = {"class_type": "PrimitiveInt", "inputs": {"value": 7}}
    own = {**graph["3"]["inputs"], "seed": ["21", 0], "denoise": 0.5, "latent_image": ["20", 0], "steps": 14}
    graph["22"] = {"class_type": "KSampler", "inputs": own}
    graph["8"]["inputs"]["samples"] = ["22", 0]
    with pytest.warns(UserWarning, match="draws in several passes, and only the last is read"):
        found, _, _ = comfyui.read(json.dumps(graph))
    assert (found.seed, found.steps, found.strength, found.size) == (7, 14, 0.5, (1024, 1024))
    assert found.prompt == "a (cat:1.2)" and found.negative == "text, watermark"


def test_each_side_keeps_to_itself_through_a_node_that_both_pass():
    graph = json.loads(json.dumps(GRAPH))
    both = {"positive": ["6", 0], "negative": ["7", 0], "strength": 1.0}
    graph["30"] = {"class_type": "ControlNetApplyAdvanced", "inputs": both}
    graph["3"]["inputs"] |= {"positive": ["30", 0], "negative": ["30", 1]}
    assert comfyui.read(json.dumps(graph))[0] == SETTINGS


def test_its_ddim_is_euler():
    graph = json.loads(json.dumps(GRAPH))
    graph["3"]["inputs"] |= {"sampler_name": "ddim", "scheduler": "normal"}
    found, _, _ = comfyui.read(json.dumps(graph))
    assert (found.sampler, found.schedule) == ("euler", "normal")


def test_layers_that_are_left_out_and_a_picture_to_begin_with_are_seen():
    graph = json.loads(json.dumps(GRAPH))
    graph["31"] = {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["11", 1]}}
    for node in ("6", "7"):
        graph[node]["inputs"]["clip"] = ["31", 0]
    assert comfyui.read(json.dumps(graph))[0].clip_skip == 1
    graph["3"]["inputs"]["denoise"] = 0.6
    with pytest.warns(UserWarning, match="begins with a picture, which is not read"):
        comfyui.read(json.dumps(graph))


def test_custom_samplers_are_told_by_several_nodes():
    graph = {
        "1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 1]}},
        "3": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"noise": ["4", 0], "guider": ["5", 0], "sampler": ["6", 0], "sigmas": ["7", 0]},
        },
        "4": {"class_type": "RandomNoise", "inputs": {"noise_seed": 12}},
        "5": {"class_type": "CFGGuider", "inputs": {"cfg": 3.5, "positive": ["8", 0], "negative": ["9", 0]}},
        "6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler_ancestral"}},
        "7": {"class_type": "BasicScheduler", "inputs": {"scheduler": "beta", "steps": 9, "denoise": 1.0}},
        "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog"}},
        "9": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat"}},
    }
    found, _, _ = comfyui.read(json.dumps(graph))
    expected = Settings("a dog", "a cat", sampler="euler_a", schedule="beta", steps=9, cfg=3.5, seed=12)
    assert found == expected


def test_a_picture_with_a_graph_has_an_entry(tmp_path):
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(GRAPH))
    texts.add_text("workflow", " " * 2**21, zip=True)  # more than Pillow unpacks
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=texts)
    found = album.read(tmp_path / "a.png")
    assert found == album.Entry(SETTINGS, {}, "v1-5-pruned.safetensors", ours=False, manner="comfyui")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"), ("[1]", "no nodes"), ('{"1": 3}', "no nodes"), ("[" * 100_000, "no JSON"),
        ('{"1": {"class_type": "Note", "inputs": {}}}', "no sampler among 'Note'"),
        # a circle
        ('{"1": {"inputs": {"a": ["2", 0]}}, "2": {"inputs": {"a": ["1", 0]}}}', "no sampler"),
    ],
)  # fmt: skip
def test_what_is_no_graph_is_said_in_a_sentence(text, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        comfyui.read(text)
    texts = PngInfo()
    texts.add_text("prompt", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=texts)
    with pytest.raises(ValueError, match="carries a graph, but no settings"):
        album.read(tmp_path / "a.png")


def test_odd_values_are_left_open():
    graph = json.loads(json.dumps(GRAPH))
    graph["3"]["inputs"].update(seed="x", steps=True, cfg=None, sampler_name=3, denoise=0)
    found, _, _ = comfyui.read(json.dumps(graph))
    assert (found.seed, found.steps, found.cfg, found.sampler) == (None, None, None, None)
    assert found.strength == Settings().strength
