"""The noise schedule: how much picture and noise there is at each timestep, and when each sampler looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..model.ddpm import Sampler, randn
from ..model.pictures import to_tensor
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .experiments import suiting
from .figures import GAP, GREY, MARGIN, Exhibit, axes_at, place, resized, sheet, styled, write
from .guide import GUIDE, one_line
from .latents import test_card

WIDTH = 1160


def signal_and_noise(sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns t, and the shares of picture and noise in the network's input at t: (T,) each, float64."""
    t = torch.arange(sampler.num_training_steps)
    one, none = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    signal, noise = sampler.add_noise(one, t, none)[:, 0], sampler.add_noise(none, t, one)[:, 0]
    if noise.max() > 1:  # samplers in σ blow x_t up, and scale it down for the network
        length = torch.hypot(signal, noise)
        signal, noise = signal / length, noise / length
    return t, signal, noise


def schedule(pipe: StableDiffusion, request: Request, names: Sequence[str] | None = None) -> Exhibit:
    """Draws curves, a test card under growing noise, and the samplers' timesteps; None: of all except lcm."""
    names = names or suiting(pipe)
    facts, flow = pipe.config.schedule, pipe.config.schedule.prediction_type == "flow"
    request = request.for_model(pipe.config)
    sampler = pipe.sampler(replace(request, sampler=suiting(pipe)[0]))
    t, signal, noise = signal_and_noise(sampler)
    snr = (signal / noise).square()  # SNR(t) = ᾱₜ / (1 - ᾱₜ), §2, Kingma et al. 2021
    crossing = int((snr < 1).int().argmax())

    path = f"{facts.beta_schedule.replace('_', ' ')} β from {facts.beta_start:g} to {facts.beta_end:g}"
    if facts.trained_betas is not None or facts.beta_schedule == "squaredcos_cap_v2":
        path = "βs of its own" if facts.trained_betas is not None else "ᾱ as a squared cosine"
    if flow:
        path = "straight lines between picture and noise"
    elif facts.zero_terminal_snr:
        path += ", to noise alone"
    target = facts.prediction_type.removesuffix("_prediction")
    subtitle = f"{pipe.config.name} · {path} · the network predicts {target} · {request.steps} steps"
    _, top = sheet(WIDTH, 100, "The noise schedule", subtitle)
    shown = torch.linspace(0, len(t) - 1, 8).round().long().tolist()
    cell = (WIDTH - 2 * MARGIN - 7 * GAP) // 8
    pictures_at, ticks_at = top + 340, top + 340 + cell + 90
    height = ticks_at + 20 * len(names) + 70
    figure, _ = sheet(WIDTH, height, "The noise schedule", subtitle)

    with styled():
        left = axes_at(figure, MARGIN + 40, top + 34, 480, 220)
        left.set(title="What $x_t$ is made of", xlabel="timestep t", xlim=(0, len(t)), ylim=(0, 1.02))
        left.plot(t, signal, label="picture, " + (r"$1-\sigma$" if flow else r"$\sqrt{\bar\alpha_t}$"))
        left.plot(t, noise, label="noise, " + (r"$\sigma$" if flow else r"$\sqrt{1-\bar\alpha_t}$"))
        left.axvline(crossing, color=GREY, linewidth=1, linestyle=":")
        left.legend()
        right = axes_at(figure, 620, top + 34, WIDTH - 620 - MARGIN, 220)
        right.set(title="Signal to noise", xlabel="timestep t", xlim=(0, len(t)), yscale="log")
        right.plot(t, snr.clamp(1e-6, 1e6), label="SNR")
        right.axhline(1, color=GREY, linewidth=1, linestyle=":")
        right.text(crossing, 1.5, f" SNR = 1 at t = {crossing}", color=GREY)

    write(figure, MARGIN, pictures_at - 16, "A picture under that much noise", size=11, weight="bold")
    z = pipe.encode_image(to_tensor(test_card(pipe.config.size))).cpu()
    eps = randn(z.shape, torch.Generator().manual_seed(request.seeds[0]))
    for k, at in enumerate(shown):
        picture = pipe.decode(sampler.add_noise(z, at, eps))[0]
        x = MARGIN + k * (cell + GAP)
        place(figure, resized(picture, (cell, cell)), x, pictures_at)
        ratio = "∞" if snr[at].isinf() else f"{snr[at]:,.0f}" if snr[at] >= 100 else f"{snr[at]:.2g}"
        label = f"t = {at}\nSNR {ratio}"
        write(figure, x + cell / 2, pictures_at + cell + 22, label, size=9, ha="center", color=GREY)

    timesteps: dict[str, list[float]] = {}
    for name in names:
        timesteps[name] = pipe.sampler(replace(request, sampler=name)).timesteps.tolist()
    with styled():
        axes = axes_at(figure, MARGIN + 130, ticks_at + 20, WIDTH - 2 * MARGIN - 130, 20 * len(names))
        axes.set(
            title="Where the samplers look",
            xlabel="timestep t; a sampler goes from right to left",
            xlim=(-10, len(t)),
        )
        axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        for row, steps in enumerate(timesteps.values()):
            axes.plot(steps, [row] * len(steps), "|", markersize=11, markeredgewidth=1.4)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)

    alt = one_line(f"""
        Above, two curves over {len(t)} timesteps: the picture's share falls from 1, the noise's rises, and
        they cross at t = {crossing}. In the middle a test card under more and more noise. Below, the
        timesteps that each of {len(names)} samplers uses in {request.steps} steps.""")
    ratios = {int(i): None if snr[i].isinf() else snr[i].item() for i in shown}  # None: no noise at all
    numbers = {"crossing": crossing, "snr": ratios, "timesteps": timesteps}
    return Exhibit(figure, "The noise schedule", alt, GUIDE["schedule"], numbers)
