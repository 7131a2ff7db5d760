"""How a picture comes out of noise: the steps of the denoising loop, recorded and shown.

`record` draws a picture and keeps the tensors of each step. A `Trajectory` is written as data
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
from ..settings import of_request
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
    """All N steps of a picture. Tensors are (N, C, h, w), float32, on the CPU, as the sampler scales them."""

    request: Request
    t: list[float]  # the timestep of each step
    x_t: Tensor  # the latents before the step
    x0: Tensor  # the clean latents that the network saw in them
    eps: Tensor  # the noise that the network saw, after guidance
    eps_cond: Tensor  # … with the prompt
    eps_uncond: (
        Tensor | None
    )  # … without; as with it in steps without guidance; None if there was none at all
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
        """Returns single numbers for each step: root mean squares over the latents."""
        rows = []
        for i, t in enumerate(self.t):
            row = {"t": t, "x_t": rms(self.x_t[i]), "x0": rms(self.x0[i])}
            row |= {"eps_cond": rms(self.eps_cond[i])}
            if self.eps_uncond is not None:
                row["eps_uncond"] = rms(self.eps_uncond[i])
                row["guidance"] = rms(self.eps_cond[i] - self.eps_uncond[i])
            row["x0_change"] = rms(self.x0[i] - self.x0[i - 1]) if i else 0.0
            row["x0_to_end"] = rms(self.x0[i] - self.latents[0])
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
        facts = {"settings": of_request(self.request), "steps": self.norms(), "shown": self.shown}
        write_json(os.path.join(folder, "trajectory.json"), facts)

    def strip(self, most: int = 8) -> Exhibit:
        """Shows the film strip: at most `most` moments in three rows: x_t, x0, where guidance pushes."""
        chosen = [self.shown.index(i) for i in spread(self.shown, most)]
        rows = [[self.shown_x_t[k] for k in chosen], [self.shown_x0[k] for k in chosen]]
        labels = ["$x_t$\nwhat the\nnetwork\nis given", "$\\hat{x}_0$\nwhat it sees\nin it"]
        captions: list[list[str]] = [[], []]
        if (guidance := self.guidance) is not None:
            maps = guidance.square().mean(1).sqrt()  # (N, C, h, w) -> (N, h, w)
            most_heat = maps[[self.shown[k] for k in chosen]].max().item()
            size = self.picture.size
            rows.append([heat_picture(maps[self.shown[k]], 0, most_heat).resize(size, 0) for k in chosen])
            labels.append("where the\nprompt pushes,\nand how hard")
            captions.append([f"{rms(guidance[self.shown[k]]):.3f}" for k in chosen])
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
        """Shows how strongly the prompt pushes, and how settled the picture is, step by step."""
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
    request = request.for_model(pipe.config)
    steps = list(pipe.denoise(request))
    shown = spread(range(len(steps)), show)
    latents = steps[-1].latents

    def stack(name: str) -> Tensor:
        return torch.cat([getattr(step, name) for step in steps]).cpu()

    # Some steps may be without guidance, as `guidance_interval` says: there, nothing pushes.
    without = [step.eps_cond if step.eps_uncond is None else step.eps_uncond for step in steps]
    guided = any(step.eps_uncond is not None for step in steps)

    return Trajectory(
        request=request,
        t=[float(step.t) for step in steps],
        x_t=stack("x_t"),
        x0=stack("x0"),
        eps=stack("eps"),
        eps_cond=stack("eps_cond"),
        eps_uncond=torch.cat(without).cpu() if guided else None,
        latents=latents.cpu(),
        picture=pipe.decode(latents)[0],
        shown=shown,
        shown_x_t=[decode_noisy(pipe, steps[i].x_t) for i in shown],
        shown_x0=[pipe.decode(steps[i].x0)[0] for i in shown],
    )


def decode_noisy(pipe: StableDiffusion, x_t: Tensor) -> Image.Image:
    """Decodes latents (1, C, h, w) that are still noisy."""
    # Samplers in σ blow x_t up. At most unit variance is what the decoder knows.
    return pipe.decode(x_t / x_t.std().clamp(min=1))[0]


def describe(request: Request, *varied: str) -> str:
    """Returns the settings as a line of text, without those that are varied and those that are open."""
    negative = request.negatives[0]
    line = {
        "prompt": f"“{request.prompts[0]}”" + (f", not “{negative}”" if negative else ""),
        "seed": f"seed {request.seed}",
        "sampler": request.sampler,
        "steps": None if request.steps is None else f"{request.steps} steps",
        "cfg": None if request.cfg is None else f"guidance {request.cfg:g}",
    }
    return " · ".join(part for name, part in line.items() if part and name not in varied)


def spread(indices: Any, most: int) -> list[int]:
    """Returns at most `most` of the indices, evenly spread, the first and the last among them."""
    last = len(indices) - 1
    places = torch.linspace(0, last, min(most, last + 1)).round().long().tolist()
    return [int(indices[place]) for place in places]


def rms(x: Tensor) -> float:
    """Returns the root mean square."""
    return x.double().square().mean().sqrt().item()


def _pixels(pictures: list[Image.Image]) -> Tensor:
    """Pictures -> (K, H, W, 3) uint8"""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
