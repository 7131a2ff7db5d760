"""Settings out of a ComfyUI graph, which its pictures carry as the PNG text "prompt".

{"3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "model": ["4", 0], …}}, "4": …}

A graph is a program, and only a part of it is settings. Beginning at the node that saves the picture, the
nearest sampler is found, and around it what it is told. Nodes that are not known are passed through.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

from .model.sentences import shown
from .settings import Settings

SAVING = ("SaveImage", "PreviewImage")
SAMPLING = ("KSampler", "SamplerCustom")  # the beginnings of the classes' names
WORDS = ("positive", "negative", "conditioning")  # links that lead to prompts


class Graph:
    """The nodes by their ids. Raises ValueError, in one sentence, for a text that is no graph."""

    def __init__(self, text: str) -> None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("it is no JSON") from None
        nodes = found.items() if isinstance(found, dict) else ()
        self.nodes: dict[str, dict[str, Any]] = {
            key: node
            for key, node in nodes
            if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        }
        if not self.nodes:
            raise ValueError("it has no nodes")

    def kind(self, node: str) -> str:
        """Returns the class of a node."""
        return str(self.nodes[node].get("class_type", ""))

    def link(self, value: Any) -> str | None:
        """Returns the node that a value is a link to; None for any other value."""
        linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        return value[0] if linked and value[0] in self.nodes else None

    def behind(self, start: str, without: tuple[str, ...] = ()) -> Iterator[str]:
        """Yields a node and all that it depends on, nearest first, without the inputs of those names."""
        seen, waiting = {start}, [start]
        while waiting:
            node = waiting.pop(0)
            yield node
            for name, value in self.nodes[node]["inputs"].items():
                linked = self.link(value)
                if linked is not None and name not in without and linked not in seen:
                    seen.add(linked)
                    waiting.append(linked)

    def said(self, start: str, kind: type, *names: str, without: tuple[str, ...] = WORDS) -> Any:
        """Returns the nearest value of that kind under one of these names, or None."""
        for node in self.behind(start, without):
            inputs = self.nodes[node]["inputs"]
            for name in names:
                value = inputs.get(name)
                linked = self.link(value)
                if linked is not None:  # a node that holds nothing but a value
                    value = self.nodes[linked]["inputs"].get("value")
                if isinstance(value, kind) and not isinstance(value, bool):
                    return value
        return None

    def text(self, sampler: str, side: str) -> str | None:
        """Returns the prompt of a side, "positive" or "negative"."""
        for node in self.behind(sampler, ("latent_image", "latent")):
            linked = self.link(self.nodes[node]["inputs"].get(side))
            if linked is not None:
                seen = {node}
                while linked not in seen:  # through nodes that pass both sides on, as ControlNetApplyAdvanced
                    seen.add(linked)
                    linked = self.link(self.nodes[linked]["inputs"].get(side)) or linked
                return self.said(linked, str, "text", "text_g", "prompt", without=())
        return None


def read(text: str) -> tuple[Settings, dict[str, Any], str]:
    """Reads a graph: its settings, no hashes, and the name of the model's file.

    LoRAs are files of the names that they have there. Raises ValueError, in one sentence, for a text that is
    no graph, and for a graph without a sampler.
    """
    graph = Graph(text)
    sampler = _sampler(graph)
    from .steer.manners import names_here

    name = graph.said(sampler, str, "sampler_name")
    schedule = graph.said(sampler, str, "scheduler")
    if name is not None:
        from . import sampling  # noqa: F401  # adds its samplers

        # Its ddim is Euler's method by another name.
        name, schedule = names_here("comfyui", "euler" if name == "ddim" else name, schedule)
    cfg, strength = (graph.said(sampler, int | float, one) for one in ("cfg", "denoise"))  # type: ignore[arg-type]
    latents = graph.link(graph.nodes[sampler]["inputs"].get("latent_image")) or sampler
    width, height = (graph.said(latents, int, side) for side in ("width", "height"))
    if any(_samples(graph, node) for node in graph.behind(latents) if node != sampler):
        warnings.warn("the graph draws in several passes, and only the last is read", stacklevel=2)
    elif strength is not None and strength < 1:
        warnings.warn("the graph begins with a picture, which is not read", stacklevel=2)
    skipped = graph.said(sampler, int, "stop_at_clip_layer", without=())
    values = {
        "prompt": graph.text(sampler, "positive") or graph.text(sampler, "conditioning"),
        "negative": graph.text(sampler, "negative"),
        "sampler": name,
        "schedule": schedule,
        "steps": graph.said(sampler, int, "steps"),
        "cfg": None if cfg is None else float(cfg),
        "seed": graph.said(sampler, int, "seed", "noise_seed"),
        "size": None if width is None or height is None else (width, height),
        "strength": None if strength is None or not 0 < strength < 1 else float(strength),
        "lora": _loras(graph, sampler),
        "clip_skip": None if skipped is None else max(0, -skipped - 1),  # they count back from −1
    }
    model = graph.said(sampler, str, "ckpt_name", "unet_name") or ""
    return Settings(**{key: value for key, value in values.items() if value not in (None, ())}), {}, model


def _sampler(graph: Graph) -> str:
    """Returns the sampler nearest to where the picture is saved, or else any."""
    ends = [node for node in graph.nodes if graph.kind(node).startswith(SAVING)]
    for end in [*ends, *graph.nodes]:
        for node in graph.behind(end):
            if _samples(graph, node):
                return node
    kinds = ", ".join(sorted({graph.kind(node) for node in graph.nodes}))
    raise ValueError(f"it has no sampler among {shown(kinds)}")


def _samples(graph: Graph, node: str) -> bool:
    """True for a node that draws."""
    return graph.kind(node).startswith(SAMPLING) and not graph.kind(node).startswith("KSamplerSelect")


def _loras(graph: Graph, sampler: str) -> tuple[tuple[str, float], ...]:
    """Returns the LoRAs on the way from the sampler to the model, in the order in which they are added."""
    found = []
    for node in graph.behind(sampler, (*WORDS, "latent_image")):
        inputs = graph.nodes[node]["inputs"]
        file, weight = inputs.get("lora_name"), inputs.get("strength_model")
        if isinstance(file, str) and isinstance(weight, int | float):
            found.append((re.split(r"[/\\]", file)[-1], float(weight)))  # a name, and no place
    return tuple(reversed(found))
