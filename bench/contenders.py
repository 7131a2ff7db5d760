"""The contenders of `bench.speed`: the same weights, the same inputs, each in a process of its own.

`python -m bench.contenders NAME FOLDER DEVICE` is such a process. Each line of stdin asks it for a row; it
answers on stdout with the seconds that it took, its peak memory, and the first time also with its output.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

PROMPT, STEPS, SCALE, SEED = "a cat stretching on the floor", 20, 7.5, 0

# name -> the module that it needs
CONTENDERS = {
    "diffusers fp32": "diffusers",  # the first is the reference for the output
    "diffusers bf16": "diffusers",
    "diffusers bf16 channels-last": "diffusers",
    "diffusers bf16 channels-last compiled": "diffusers",
    "OpenVINO bf16": "openvino",
    "stable-diffusion.cpp f16": "stable_diffusion_cpp",
    "reifusion fp32": "reifusion",
    "reifusion bf16": "reifusion",
}
# Names to ask of a lazy package, so that its import is complete when loading begins.
ENTRY = {"diffusers": "StableDiffusionPipeline", "reifusion": "load"}
Run = Callable[[], Any]  # does the row's work once and returns an array, or what np.asarray takes


def installed(name: str) -> bool:
    return importlib.util.find_spec(CONTENDERS[name]) is not None


def inputs(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the input, the same for all contenders: float32 tensors, drawn from fixed seeds."""
    import torch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))

    latents = normal(row.get("batch", 1), 4, row["height"] // 8, row["width"] // 8)
    return {"latents": latents, "context": normal(2 * len(latents), 77, row["context_width"]), "t": 501}


class Reifusion:
    def __init__(self, folder: Path, dtype: str, device: str):
        import reifusion

        self.pipe = reifusion.load(folder / "model.safetensors", device, dtype)

    def row(self, row: dict[str, Any]) -> Run:
        import torch

        pipe, models, given = self.pipe, self.pipe.models, inputs(row)
        latents, context = (given[name].to(pipe.device, pipe.dtype) for name in ("latents", "context"))
        if row["kind"] == "text":
            return lambda: pipe.encode_text([PROMPT, ""]).float().cpu()
        if row["kind"] == "unet":
            x, t = latents.repeat(2, 1, 1, 1), torch.tensor([given["t"]], device=pipe.device)
            return torch.inference_mode()(lambda: models["diffusion"](x, context, t).float().cpu())
        if row["kind"] == "vae":
            return torch.inference_mode()(lambda: models["decoder"](latents).float().cpu())
        settings: dict[str, Any] = {"sampler": "ddim", "steps": row["steps"], "cfg": SCALE}
        settings["size"] = (row["width"], row["height"])
        return lambda: pipe.generate(PROMPT, seed=SEED, progress=False, **settings)


class Diffusers:
    def __init__(self, folder: Path, dtype: str, device: str, channels_last: bool, compiled: bool):
        import diffusers
        import torch

        diffusers.utils.logging.disable_progress_bar()
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        if device == "cuda" and dtype == "bf16":
            kind = torch.float16  # as reifusion does on CUDA
        self.pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            str(folder / "diffusers"), torch_dtype=kind, safety_checker=None, requires_safety_checker=False
        ).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = diffusers.DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.kind, self.device = kind, device
        if channels_last:
            for network in (self.pipe.unet, self.pipe.vae):
                network.to(memory_format=torch.channels_last)
        if compiled:
            self.pipe.unet = torch.compile(self.pipe.unet)
            self.pipe.vae.decode = torch.compile(self.pipe.vae.decode)

    def row(self, row: dict[str, Any]) -> Run:
        import torch

        pipe, given = self.pipe, inputs(row)
        latents, context = (given[name].to(self.device, self.kind) for name in ("latents", "context"))
        if row["kind"] == "text":

            def text() -> Any:
                long = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
                tokens = pipe.tokenizer([PROMPT, ""], **long).input_ids
                return pipe.text_encoder(tokens.to(self.device))[0].float().cpu()

            return text
        if row["kind"] == "unet":
            x, t = latents.repeat(2, 1, 1, 1), torch.tensor(given["t"], device=self.device)
            return lambda: pipe.unet(x, t, context).sample.float().cpu()
        if row["kind"] == "vae":
            scale = pipe.vae.config.scaling_factor
            return lambda: pipe.vae.decode(latents / scale).sample.float().cpu()
        size = {"height": row["height"], "width": row["width"]}
        settings: dict[str, Any] = {"num_inference_steps": row["steps"], "guidance_scale": SCALE}
        return lambda: pipe(PROMPT, latents=latents.clone(), **settings, **size).images[0]


class OpenVINO:
    """OpenVINO: converted from diffusers's networks once and kept as files, and compiled for each size."""

    def __init__(self, folder: Path):
        import openvino  # type: ignore[import-untyped,import-not-found,unused-ignore]
        import torch
        from diffusers import DDIMScheduler
        from transformers import CLIPTokenizer

        self.folder, self.core = folder / "openvino", openvino.Core()
        self.settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder / "diffusers" / "tokenizer"))
        self.scheduler = DDIMScheduler.from_pretrained(str(folder / "diffusers"), subfolder="scheduler")
        self.scale = json.loads((folder / "diffusers" / "vae" / "config.json").read_text())["scaling_factor"]

    def _compiled(self, name: str, *shapes: list[int]) -> Callable[..., np.ndarray]:
        model = self.core.read_model(str(self.folder / f"{name}.xml"))
        model.reshape(dict(zip(model.inputs, shapes)))
        request = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        return lambda *given: request.infer(dict(enumerate(given)))[0].copy()

    def row(self, row: dict[str, Any]) -> Run:
        import torch

        given = inputs(row)
        latents, context = given["latents"].numpy(), given["context"].numpy()
        batch, _, height, width = latents.shape
        if row["kind"] in ("text", "picture"):
            text = self._compiled("text", [2, 77])
        if row["kind"] in ("unet", "picture"):
            unet = self._compiled("unet", [2 * batch, 4, height, width], [], list(context.shape))
        if row["kind"] in ("vae", "picture"):
            vae = self._compiled("vae", list(latents.shape))

        long = {"padding": "max_length", "max_length": 77, "return_tensors": "np"}

        def encode() -> np.ndarray:
            return text(self.tokenizer([PROMPT, ""], **long).input_ids)

        def picture() -> Any:
            words, x = encode(), torch.from_numpy(latents)
            self.scheduler.set_timesteps(row["steps"])
            for t in self.scheduler.timesteps:
                cond, uncond = torch.from_numpy(unet(x.repeat(2, 1, 1, 1).numpy(), t.numpy(), words)).chunk(2)
                x = self.scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
            pixels = vae((x / self.scale).numpy())[0].transpose(1, 2, 0)
            return ((pixels + 1) * 127.5).round().clip(0, 255).astype(np.uint8)

        runs: dict[str, Run] = {
            "text": encode,
            "unet": lambda: unet(np.concatenate([latents] * 2), np.array(given["t"]), context),
            "vae": lambda: vae(latents / self.scale),
            "picture": picture,
        }
        return runs[row["kind"]]


def convert_to_openvino(folder: Path) -> None:
    """Writes diffusers's networks as OpenVINO's files, with one network in memory at a time. Runs once."""
    import openvino  # type: ignore[import-untyped,import-not-found,unused-ignore]
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    class Call(torch.nn.Module):
        """A network whose forward is a function of tensors, which the converter can trace."""

        def __init__(self, network: torch.nn.Module, call: Callable):
            super().__init__()
            self.network, self.call = network.eval(), call

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return self.call(self.network, *given)

    def text() -> tuple[Call, tuple[torch.Tensor, ...]]:
        network = CLIPTextModel.from_pretrained(source, subfolder="text_encoder")
        call = Call(network, lambda network, tokens: network(tokens, return_dict=False)[0])
        return call, (torch.zeros(2, 77, dtype=torch.int64),)

    def unet() -> tuple[Call, tuple[torch.Tensor, ...]]:
        network = UNet2DConditionModel.from_pretrained(source, subfolder="unet")
        call = Call(network, lambda network, x, t, words: network(x, t, words, return_dict=False)[0])
        words = torch.zeros(2, 77, network.config.cross_attention_dim)
        return call, (torch.zeros(2, 4, 64, 64), torch.tensor(1), words)

    def vae() -> tuple[Call, tuple[torch.Tensor, ...]]:
        network = AutoencoderKL.from_pretrained(source, subfolder="vae")
        call = Call(network, lambda network, z: network.decode(z, return_dict=False)[0])
        return call, (torch.zeros(1, 4, 64, 64),)

    source = str(folder / "diffusers")
    for network in (text, unet, vae):
        path = folder / "openvino" / f"{network.__name__}.xml"
        if not path.exists():
            call, example = network()
            with torch.no_grad():
                model = openvino.convert_model(call, example_input=example)
            del call
            unfinished = folder / "openvino" / "unfinished"
            openvino.save_model(model, str(unfinished / path.name), compress_to_fp16=True)
            for suffix in (".bin", ".xml"):  # .xml last: if it is there, the rest is too
                (unfinished / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


class StableDiffusionCpp:
    """Draws whole pictures only: its parts cannot be called. Its noise is its own, so its picture differs."""

    def __init__(self, folder: Path):
        from stable_diffusion_cpp import StableDiffusion  # type: ignore[import-untyped,import-not-found,unused-ignore]

        self.model = StableDiffusion(model_path=str(folder / "model.safetensors"), wtype="f16", verbose=False)

    def row(self, row: dict[str, Any]) -> Run | None:
        if row["kind"] != "picture":
            return None
        settings: dict[str, Any] = {"sample_steps": row["steps"], "cfg": SCALE, "seed": SEED}
        size = {"height": row["height"], "width": row["width"]}
        return lambda: self.model.generate_image(prompt=PROMPT, sample_method="euler", **settings, **size)[0]


def make(name: str, folder: Path, device: str) -> Any:
    kind, _, rest = name.partition(" ")
    if kind == "reifusion":
        return Reifusion(folder, "fp16" if device == "cuda" and rest == "bf16" else rest, device)
    if kind == "diffusers":
        return Diffusers(folder, rest[:4], device, "channels-last" in rest, "compiled" in rest)
    return OpenVINO(folder) if kind == "OpenVINO" else StableDiffusionCpp(folder)


def memory(kind: str) -> float:
    """Returns resident memory in MB: VmRSS now, VmHWM at most since `forget_peak`; 0 if it is unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), 0.0)


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def own_stdout() -> TextIO:
    """Opens stdout for answers. A library's prints must not be mistaken for answers: they go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    name, folder, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if device == "convert":  # in a process of its own, so that its memory is not counted
        return convert_to_openvino(folder)
    answers = own_stdout()

    def answer(**facts: Any) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    start = time.perf_counter()
    if name != "stable-diffusion.cpp f16":
        import torch

        torch.set_grad_enabled(False)
        module = importlib.import_module(CONTENDERS[name])
        getattr(module, ENTRY.get(module.__name__, "__name__"))
    imported = time.perf_counter()
    contender = make(name, folder, device)
    loaded = time.perf_counter()
    answer(imported=imported - start, loaded=loaded - imported, peak=memory("VmHWM"))

    runs: dict[str, Run | None] = {}
    for line in sys.stdin:
        row = json.loads(line)
        try:
            before = memory("VmRSS")
            forget_peak()
            first = row["name"] not in runs
            if first:
                runs.clear()  # frees the last row's compiled networks and arrays
                runs[row["name"]] = contender.row(row)
            run = runs[row["name"]]
            if run is None:
                answer(seconds=None)
                continue
            start = time.perf_counter()
            output = run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            facts: dict[str, Any] = {"seconds": seconds, "peak": memory("VmHWM"), "before": before}
            if first:
                with tempfile.NamedTemporaryFile(suffix=".npy", delete=False) as file:
                    np.save(file, np.asarray(output, dtype=np.float32))
                facts["output"] = file.name
            answer(**facts)
        except Exception as error:
            answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])


if __name__ == "__main__":
    main()
