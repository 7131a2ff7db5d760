"""How a picture comes out of noise: every step of the denoising loop, kept, and shown.

`record` draws a picture and keeps the input and output of each step. A `Trajectory` is written as data
(`save`), a film strip (`strip`), an animation (`animate`) and curves (`curves`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..files import whole, write_json
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..weights.writing import write_tensors
from .figures import (
    GAP,
    INK,
    LINE,
    MARGIN,
    PAPER,
    Exhibit,
    axes_at,
    fitting_size,
    heat_picture,
    picture_grid,
    resized,
    sheet,
    styled,
    typeface,
)
from .guide import GUIDE, one_line


@dataclass
class Trajectory:
    """N steps of one picture. Tensors are (N, C, h, w), float32, on the CPU, in the sampler's own scaling."""

    request: Request
    t: list[float]  # the timestep of each step
    x_t: Tensor  # the latents before the step
    x0: Tensor  # the clean latents that the network saw in x_t
    eps: Tensor  # the noise that the network saw, after guidance
    eps_cond: Tensor  # the noise seen with the prompt
    eps_uncond: Tensor | None  # the noise seen without the prompt; None if there was no guidance
    latents: Tensor  # (1, C, h, w), after the last step
    picture: Image.Image
    shown: list[int]  # the steps whose latents are decoded below
    shown_x_t: list[Image.Image]
    shown_x0: list[Image.Image]

    @property
    def guidance(self) -> Tensor | None:
        """ε_cond - ε_uncond (N, C, h, w): where the prompt pushes."""
        return None if self.eps_uncond is None else self.eps_cond - self.eps_uncond

    def norms(self) -> list[dict[str, float]]:
        """Sums up each step in single numbers: root mean squares over the latents."""
        rows = []
        for i, t in enumerate(self.t):
            row = {"t": t, "x_t": _rms(self.x_t[i]), "x0": _rms(self.x0[i])}
            row |= {"eps_cond": _rms(self.eps_cond[i])}
            if self.eps_uncond is not None:
                row["eps_uncond"] = _rms(self.eps_uncond[i])
                row["guidance"] = _rms(self.eps_cond[i] - self.eps_uncond[i])
            row["x0_change"] = _rms(self.x0[i] - self.x0[i - 1]) if i else 0.0
            row["x0_to_end"] = _rms(self.x0[i] - self.latents[0])
            rows.append(row)
        return rows

    def save(self, folder: str | os.PathLike) -> None:
        """Writes trajectory.safetensors, the tensors and the decoded previews, and trajectory.json."""
        tensors = {name: getattr(self, name) for name in ("x_t", "x0", "eps", "eps_cond", "latents")}
        if self.eps_uncond is not None and self.guidance is not None:
            tensors |= {"eps_uncond": self.eps_uncond, "guidance": self.guidance}
        tensors |= {"t": torch.tensor(self.t, dtype=torch.float64), "shown": torch.tensor(self.shown)}
        tensors |= {"shown_x_t": _pixels(self.shown_x_t), "shown_x0": _pixels(self.shown_x0)}
        with whole(os.path.join(folder, "trajectory.safetensors")) as temporary:
            write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        facts = {"settings": settings(self.request), "steps": self.norms(), "shown": self.shown}
        write_json(os.path.join(folder, "trajectory.json"), facts)

    def strip(self, most: int = 8) -> Exhibit:
        """The film strip: at most `most` moments, in three rows: x_t, x0, where guidance pushes."""
        chosen = [self.shown.index(i) for i in _spread(self.shown, most)]
        rows = [[self.shown_x_t[k] for k in chosen], [self.shown_x0[k] for k in chosen]]
        labels = ["$x_t$\nwhat the\nnetwork\nis given", "$\\hat{x}_0$\nwhat it sees\nin it"]
        captions: list[list[str]] = [[], []]
        if (guidance := self.guidance) is not None:
            maps = guidance.square().mean(1).sqrt()  # (N, C, h, w) -> (N, h, w)
            most_heat = maps[[self.shown[k] for k in chosen]].max().item()
            size = self.picture.size
            rows.append([heat_picture(maps[self.shown[k]], 0, most_heat).resize(size, 0) for k in chosen])
            labels.append("where the\nprompt\npushes")
            captions.append([f"{_rms(guidance[self.shown[k]]):.3f}" for k in chosen])
        columns = [f"step {self.shown[k] + 1}, t = {self.t[self.shown[k]]:g}" for k in chosen]
        figure = picture_grid(
            rows, "From noise to a picture", describe(self.request), columns=columns, rows=labels,
            captions=captions,
        )  # fmt: skip
        alt = one_line(f"""
            A film strip of {len(chosen)} of the {len(self.t)} steps that drew “{self.request.prompts[0]}”.
            The first row goes from noise to the picture; in the second, what the network sees in the noise, a
            blurred picture sharpens.""")
        return Exhibit(figure, "From noise to a picture", alt, GUIDE["strip"], {"steps": self.norms()})

    def curves(self) -> Exhibit:
        """How strongly the prompt pushes, and how settled the picture is, step by step."""
        rows = self.norms()
        figure, top = sheet(1000, 400, "What the steps do", describe(self.request))
        height = 400 - top - MARGIN - 48
        with styled():
            left = axes_at(figure, MARGIN + 44, top + 24, 400, height - 8)
            right = axes_at(figure, 560, top + 24, 400, height - 8)
            x = range(1, len(rows) + 1)
            left.set(title="How much noise the network sees", xlabel="step", ylabel="root mean square")
            left.plot(x, [row["eps_cond"] for row in rows], label="seen with the prompt")
            if self.guidance is not None:
                left.plot(x, [row["eps_uncond"] for row in rows], "--", label="seen without")
                left.plot(x, [row["guidance"] for row in rows], label="their difference: the prompt's push")
            right.set(title="How settled the picture is", xlabel="step", ylabel="root mean square")
            right.plot(x, [row["x0_to_end"] for row in rows], label=r"$\hat{x}_0$, to the final latents")
            right.plot(
                x[1:], [row["x0_change"] for row in rows[1:]], label=r"$\hat{x}_0$, to the step before"
            )
            for axes in (left, right):
                axes.set_ylim(bottom=0)
                axes.set_xlim(1, max(2, len(rows)))
                axes.legend()
        alt = one_line("""
            Two plots over the steps. Left: the size of the noise that the network sees with and without the
            prompt, and of their difference. Right: how far the predicted clean latents are from the final
            ones, and how much they change from step to step.""")
        return Exhibit(figure, "What the steps do", alt, GUIDE["curves"], {"steps": rows})

    def animate(self, path: str | os.PathLike) -> None:
        """Writes an animation, .gif or .webp by the path's suffix: x_t and x0 side by side."""
        width, height = fitting_size(*self.picture.size, 2)
        frames = []
        for k, i in enumerate(self.shown):
            frame = Image.new("RGB", (2 * width + 3 * GAP, height + 2 * GAP + LINE), PAPER)
            for x, picture in ((GAP, self.shown_x_t[k]), (width + 2 * GAP, self.shown_x0[k])):
                frame.paste(resized(picture, (width, height)), (x, GAP))
            text = f"step {i + 1} of {len(self.t)}, t = {self.t[i]:g}"
            ImageDraw.Draw(frame).text((GAP, height + GAP + 4), text, fill=INK, font=typeface(13))
            frames.append(frame)
        gif = os.fspath(path).lower().endswith(".gif")
        if gif:  # 256 colours for each frame, and no dithering, which would flicker
            frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
        options: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "loop": 0}
        options["duration"] = [160] * (len(frames) - 1) + [2000]  # ms: the end stays a while
        with whole(path) as temporary:
            frames[0].save(temporary, "GIF" if gif else "WEBP", **options)


def record(pipe: StableDiffusion, request: Request, show: int = 25) -> Trajectory:
    """Draws the request's picture and keeps every step; at most `show` of them, evenly spread, are decoded.

    Raises ValueError for a request for several pictures.
    """
    if len(request.prompts) > 1:
        raise ValueError(f"one picture at a time can be explained, not {len(request.prompts)}")
    steps = list(pipe.denoise(request))
    shown = _spread(range(len(steps)), show)
    latents = steps[-1].latents

    def stack(name: str) -> Tensor:
        return torch.cat([getattr(step, name) for step in steps]).cpu()

    return Trajectory(
        request=request,
        t=[float(step.t) for step in steps],
        x_t=stack("x_t"),
        x0=stack("x0"),
        eps=stack("eps"),
        eps_cond=stack("eps_cond"),
        eps_uncond=None if steps[0].eps_uncond is None else stack("eps_uncond"),
        latents=latents.cpu(),
        picture=pipe.decode(latents)[0],
        shown=shown,
        # Samplers in σ scale x_t up, but the decoder only knows latents of at most unit variance.
        shown_x_t=[pipe.decode(steps[i].x_t / steps[i].x_t.std().clamp(min=1))[0] for i in shown],
        shown_x0=[pipe.decode(steps[i].x0)[0] for i in shown],
    )


def settings(request: Request) -> dict[str, Any]:
    """Returns the settings that decide the picture, as JSON can hold them."""
    return {
        "prompt": request.prompts[0],
        "negative": request.negatives[0],
        "seed": request.seeds[0],
        "sampler": request.sampler_name or "default sampler",
        "steps": request.n_inference_steps,
        "cfg": request.cfg_scale,
    }


def describe(request: Request, *varied: str) -> str:
    """Returns the settings as a line of text, without those that are varied."""
    facts = settings(request)
    line = {
        "prompt": f"“{facts['prompt']}”" + (f", not “{facts['negative']}”" if facts["negative"] else ""),
        "seed": f"seed {facts['seed']}",
        "sampler": facts["sampler"],
        "steps": f"{facts['steps']} steps",
        "cfg": f"guidance {facts['cfg']:g}",
    }
    return " · ".join(part for name, part in line.items() if name not in varied)


def _spread(indices: Any, most: int) -> list[int]:
    """Returns at most `most` of the indices, evenly spread, including the first and the last."""
    last = len(indices) - 1
    places = torch.linspace(0, last, min(most, last + 1)).round().long().tolist()
    return [int(indices[place]) for place in places]


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures -> (K, H, W, 3) uint8"""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
