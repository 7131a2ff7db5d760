"""A world of two numbers, in which all of diffusion can be seen: a picture is a point in the plane.

The data are two moons or a spiral. The samplers are the ones that draw pictures; only the network is small.
And since the data are known, so is the best answer that any network could give: `Best`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn import functional as F

from .. import sampling  # noqa: F401  # adds its schedules
from ..model.ddpm import DDPMSampler, Sampler
from ..model.diffusion import sinusoids
from ..model.flow import FlowSampler
from ..model.samplers import SAMPLERS
from .figures import GREY, MARGIN, PALETTE, Exhibit, axes_at, sheet, styled
from .guide import GUIDE, one_line

# What the loop asks of a network: x (B, 2) and a timestep -> (B, 2)
Network: TypeAlias = Callable[[Tensor, float], Tensor]

SPREAD = 0.12  # standard deviation of the data around their curve
COUNT = 400  # points of the curve, each with a cloud of that width: the data
DATA_SEED = 0
WIDTH = 1160


# The data


def moons() -> tuple[Tensor, Tensor]:
    """Two half circles, one in the other's arms: points (N, 2), of mean 0 and variance 1; labels (N,)."""
    angle = torch.linspace(0, math.pi, COUNT // 2, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    return _standard(torch.cat([upper, lower])), torch.arange(COUNT) // (COUNT // 2)


def spiral() -> tuple[Tensor, Tensor]:
    """A spiral of nearly one turn: points (N, 2), of mean 0 and variance 1; labels (N,), by halves."""
    turn = torch.linspace(0.15, 1, COUNT, dtype=torch.float64).sqrt() * 3 * math.pi
    points = torch.stack([turn * turn.cos(), turn * turn.sin()], dim=1)
    return _standard(points), torch.arange(COUNT) // (COUNT // 2)


def _standard(points: Tensor) -> Tensor:
    points = points - points.mean(0)
    return points / points.square().mean().sqrt()


WORLDS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"moons": moons, "spiral": spiral}


# The networks: the best one, and one that learns


def shares(sampler: Sampler, t: float) -> tuple[float, float]:
    """The shares of data and noise in the network's input at t: √ᾱₜ and √(1 - ᾱₜ); for flow 1 - σ and σ."""
    ratio = min(sampler.sigma(t), 1e9)  # ∞ where all is noise
    if sampler.prediction_type == "flow":
        return 1 / (1 + ratio), ratio / (1 + ratio)
    return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)


@dataclass(frozen=True)
class Best:
    """The best possible network for data that are known: its answers are averages over all data.

    At t, the data have become a sum of Gaussians, so that the mean of x₀, given xₜ, can be written down; the
    best ε and the best v follow from it. Nothing is learned.
    """

    points: Tensor  # (N, 2)
    sampler: Sampler

    def x0(self, x: Tensor, t: float) -> Tensor:
        """E[x₀ | xₜ]: x (B, 2) -> (B, 2)"""
        signal, noise = shares(self.sampler, t)
        # At t there is a cloud around each point, of this variance.
        variance = (signal * SPREAD) ** 2 + noise**2
        distance = torch.cdist(x, signal * self.points).square()  # (B, N)
        # Which cloud may xₜ be from? Bayes' rule for Gaussians is a softmax.
        weights = torch.softmax(-distance / (2 * variance), dim=1)
        centre = weights @ self.points  # (B, N) @ (N, 2) -> (B, 2)
        # Within a cloud, x₀ is drawn a little towards xₜ.
        return centre + signal * SPREAD**2 / variance * (x - signal * centre)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """What the network predicts, ε or for flow ε - x₀: x (B, 2) -> (B, 2)"""
        signal, noise = shares(self.sampler, t)
        x0 = self.x0(x, t)
        eps = (x - signal * x0) / noise
        return eps - x0 if self.sampler.prediction_type == "flow" else eps


class Net(nn.Module):
    """A small network: the point and the time go in, the noise comes out."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, 2), t (B,) -> (B, 2)"""
        waves = sinusoids(t.float(), 32)  # as in the U-Net: (B,) -> (B, 32)
        return self.layers(torch.cat([x, waves], dim=1))


def asked(net: Net) -> Network:
    """The network as the loop asks it."""

    @torch.no_grad()
    def answer(x: Tensor, t: float) -> Tensor:
        return net(x.float(), torch.full((len(x),), t)).double()

    return answer


def train(
    points: Tensor,
    steps: int,
    seed: int = 0,
    watch: Callable[[int, Net], None] = lambda step, net: None,
) -> tuple[Net, list[float]]:
    """Trains a network to see the noise in noisy points.

    Returns the network, and the loss of each step. watch(step, net): called
    before each step, and after the last.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, sampler, losses = Net(), DDPMSampler(), []
    optimizer = torch.optim.AdamW(net.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps + 1)
    for step in range(steps):
        watch(step, net)
        # Algorithm 1, Ho et al. 2020: take data, a time and noise …
        chosen = torch.randint(len(points), (512,), generator=generator)
        cloud = SPREAD * torch.randn(512, 2, generator=generator)
        x0 = (points[chosen] + cloud).float()
        t = torch.randint(1000, (512,), generator=generator)
        eps = torch.randn(512, 2, generator=generator)
        # … and ask for the noise.
        loss = F.mse_loss(net(sampler.add_noise(x0, t, eps), t), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    watch(steps, net)
    return net, losses


@torch.no_grad()
def loss_of(network: Network, points: Tensor, seed: int = 1) -> float:
    """The loss of a network, averaged over all timesteps: what training goes down to, at best."""
    sampler, generator = DDPMSampler(), torch.Generator().manual_seed(seed)
    errors = []
    for t in range(5, 1000, 20):
        x0 = points + SPREAD * torch.randn(points.shape, generator=generator, dtype=torch.float64)
        eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        errors.append((network(sampler.add_noise(x0, t, eps), t) - eps).square().mean())
    return torch.stack(errors).mean().item()


# The loop, as for pictures


@torch.no_grad()
def draw(sampler: Sampler, network: Network, noise: Tensor) -> list[Tensor]:
    """From noise (B, 2) to data: the points before each step, and after the last.

    The points are given as the network sees them.
    """
    x = noise * sampler.init_noise_sigma
    path = []
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(x, t)
        path.append(seen)
        x = sampler.step(t, x, network(seen, t.item()))
    return [*path, x]


def sampler_of(name: str, steps: int, schedule: str | None = None, seed: int = 0) -> Sampler:
    """A sampler with its timesteps, and with fresh noise of that seed."""
    sampler = SAMPLERS[name](torch.Generator().manual_seed(seed))
    sampler.set_inference_timesteps(steps, schedule)
    return sampler


def some_noise(count: int, seed: int) -> Tensor:
    """Noise to begin with, (count, 2)."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def away(x: Tensor, points: Tensor) -> Tensor:
    """The distance of each point (B, 2) from the nearest of the data's curve: (B,)"""
    return torch.cdist(x, points).amin(1)


# What is shown


def noising(world: str = "moons", seed: int = 0) -> Exhibit:
    """Data that drown in noise, and arrows from noisy points to the data that they may come from."""
    points, _ = WORLDS[world]()
    sampler, times = DDPMSampler(), (50, 200, 450, 800)
    best = Best(points, sampler)
    figure, top = sheet(WIDTH, 680, "Noise, and the way back", f"{world} · {len(points)} points of data")
    cell = (WIDTH - 2 * MARGIN - 3 * 20) // 4
    grid = torch.linspace(-2.4, 2.4, 15, dtype=torch.float64)
    places = torch.cartesian_prod(grid, grid)
    lengths = {}
    for k, t in enumerate(times):
        eps = some_noise(len(points), seed + k)
        x = sampler.add_noise(points, t, eps)
        arrows = best.x0(places, t) - places
        lengths[t] = arrows.norm(dim=1).mean().item()
        at = MARGIN + k * (cell + 20)
        with styled():
            above = _panel(axes_at(figure, at, top + 24, cell, cell), f"t = {t}")
            above.plot(*x.T, ".", markersize=2.5)
            below = _panel(axes_at(figure, at, top + 24 + cell + 40, cell, cell))
            below.plot(*points.T, ".", color=GREY, markersize=1.5)
            below.quiver(
                *places.T, *arrows.T, color=PALETTE[1], angles="xy", scale_units="xy", scale=2.5, width=0.005
            )
    alt = one_line(f"""
        Above, the data at four timesteps, from nearly clean to a cloud without any shape. Below, arrows
        on a grid that point from each place to the mean of the data that it may come from: at t =
        {times[-1]} all point to the middle, at t = {times[0]} each to the nearest part of the curve.""")
    return Exhibit(figure, "Noise, and the way back", alt, GUIDE["toy-noising"], {"arrow": lengths})


def learning(world: str = "moons", seed: int = 0, steps: int = 3000) -> Exhibit:
    """A network that learns these arrows: what it draws while it is trained, and its loss beside the best."""
    points, _ = WORLDS[world]()
    when = sorted({0, steps // 40, steps // 8, steps})
    noise, drawn = some_noise(600, seed), {}

    def watch(step: int, net: Net) -> None:
        if step in when:
            drawn[step] = draw(sampler_of("ddim", 50), asked(net), noise)[-1]

    net, losses = train(points, steps, seed, watch)
    least = loss_of(Best(points, DDPMSampler()), points)
    final = loss_of(asked(net), points)
    distances = {step: away(x, points).mean().item() for step, x in drawn.items()}
    figure, top = sheet(WIDTH, 690, "A network learns the arrows", f"{world} · {steps:,} steps of 512 points")
    cell = (WIDTH - 2 * MARGIN - 3 * 20) // 4
    with styled():
        for k, (step, x) in enumerate(drawn.items()):
            axes = _panel(
                axes_at(figure, MARGIN + k * (cell + 20), top + 24, cell, cell), f"after {step:,} steps"
            )
            axes.plot(*points.T, ".", color=GREY, markersize=1.5)
            axes.plot(*x.T, ".", markersize=2.5)
        axes = axes_at(figure, MARGIN + 40, top + cell + 70, WIDTH - 2 * MARGIN - 40, 210)
        smooth = np.convolve(losses, np.ones(25) / 25, "valid")
        axes.plot(np.arange(len(smooth)) + 12, smooth, label="the network's loss")
        axes.axhline(least, color=PALETTE[1], linestyle=":", label="the least that is possible")
        axes.set(xlabel="step", ylim=(0, 1.1), xlim=(0, steps))
        axes.legend()
    alt = one_line(f"""
        Points that the network draws after {", ".join(f"{s:,}" for s in drawn)} steps: at first a cloud so
        wide that most lie outside the frame, at last mostly on the curve. Below, the loss falls from about 1
        towards {least:.2f}, the least that any network can have.""")
    numbers = {"loss": final, "least": least, "distance": distances}
    return Exhibit(figure, "A network learns the arrows", alt, GUIDE["toy-learning"], numbers)


def paths(world: str = "moons", seed: int = 0, steps: int = 50) -> Exhibit:
    """The ways of the same noise to the data: DDPM, DDIM and rectified flow."""
    points, _ = WORLDS[world]()
    noise, ways = some_noise(14, seed), {}
    for title, name in (("DDPM", "ddpm"), ("DDIM", "ddim"), ("rectified flow", "flow")):
        sampler = FlowSampler() if name == "flow" else sampler_of(name, steps, seed=seed)
        sampler.set_inference_timesteps(steps)
        ways[title] = torch.stack(draw(sampler, Best(points, sampler), noise))  # (steps + 1, 14, 2)
    figure, top = sheet(WIDTH, 500, "Three ways from the same noise", f"{world} · {steps} steps")
    cell, bends = (WIDTH - 2 * MARGIN - 2 * 24) // 3, {}
    with styled():
        for k, (title, way) in enumerate(ways.items()):
            bends[title] = bend(way)
            label = f"{title}: {bends[title]:.2f} times the straight way"
            axes = _panel(axes_at(figure, MARGIN + k * (cell + 24), top + 24, cell, cell), label)
            axes.plot(*points.T, ".", color=GREY, markersize=1.5)
            for one in way.unbind(1):
                axes.plot(*one.T, linewidth=0.6 if title == "DDPM" else 1.2)
            axes.plot(*way[0].T, "o", color=GREY, markersize=3, markerfacecolor="none")
            axes.plot(*way[-1].T, "o", color="black", markersize=3)
    straight = min(bends, key=lambda name: bends[name])
    alt = one_line(f"""
        14 paths from the same noise, circles, to the data, black dots. DDPM's are ragged, the others
        smooth and bent. The paths of {straight} are the shortest, {bends[straight]:.2f} times as long as a
        straight line.""")
    return Exhibit(figure, "Three ways from the same noise", alt, GUIDE["toy-paths"], {"bend": bends})


def bend(way: Tensor) -> float:
    """How long the paths (steps, B, 2) are, beside the straight lines between their ends."""
    length = way.diff(dim=0).norm(dim=-1).sum(0)
    return (length.sum() / (way[-1] - way[0]).norm(dim=-1).sum()).item()


def guidance(world: str = "moons", seed: int = 0, scales: Sequence[float] = (0, 1, 3, 8)) -> Exhibit:
    """What guidance does to the points that are drawn: s = 0 is without the word, and s = 1 with it alone."""
    points, labels = WORLDS[world]()
    mine, others = points[labels == 0], points[labels == 1]
    sampler, noise, found = sampler_of("ddim", 100), some_noise(800, seed), {}
    with_word, without = Best(mine, sampler), Best(points, sampler)
    figure, top = sheet(WIDTH, 420, "Guidance bends what is drawn", f"{world} · the word means the blue half")
    cell = (WIDTH - 2 * MARGIN - 3 * 20) // 4
    for k, s in enumerate(scales):

        def guided(x: Tensor, t: float, s: float = s) -> Tensor:
            cond, uncond = with_word(x, t), without(x, t)
            # Eq. 6, Ho & Salimans 2022, s = 1 + w: ε = ε_uncond + s (ε_cond - ε_uncond)
            return uncond + s * (cond - uncond)

        x = draw(sampler, guided, noise)[-1]
        found[s] = {
            "right": (away(x, mine) < away(x, others)).double().mean().item(),
            "off": (away(x, points) > 3 * SPREAD).double().mean().item(),
            "from_others": away(x, others).mean().item(),
        }
        with styled():
            title = f"s = {s:g}: {found[s]['right']:.0%} right"
            axes = _panel(axes_at(figure, MARGIN + k * (cell + 20), top + 24, cell, cell), title)
            axes.plot(*mine.T, ".", markersize=2)
            axes.plot(*others.T, ".", color=GREY, markersize=2)
            axes.plot(*x.T, ".", color=PALETTE[1], markersize=2.5, alpha=0.6)
    first, last = scales[0], scales[-1]
    alt = one_line(f"""
        Points drawn with growing guidance. At s = {first:g} {found[first]["right"]:.0%} lie on the half
        that the word means, at s = 1 {found[1]["right"]:.0%}. At s = {last:g} the points keep away from
        the other half, and {found[last]["off"]:.0%} of them lie where there are no data.""")
    return Exhibit(figure, "Guidance bends what is drawn", alt, GUIDE["toy-guidance"], {"scales": found})


SOLVERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM-Solver++ 2M"}


def orders(world: str = "moons", seed: int = 0, steps: Sequence[int] = (6, 9, 13, 19, 28, 40, 60)) -> Exhibit:
    """How fast solvers come to the exact solution: the error, by the number of calls of the network."""
    points, _ = WORLDS[world]()
    noise = some_noise(200, seed)

    def solved(name: str, n: int) -> tuple[Tensor, int]:
        sampler = sampler_of(name, n, "karras")
        return draw(sampler, Best(points, sampler), noise)[-1], len(sampler.timesteps)

    exact, _ = solved("heun", 600)
    found: dict[str, list[tuple[int, float]]] = {}
    for name in SOLVERS:
        results = [solved(name, n) for n in steps]
        found[name] = [(calls, (x - exact).norm(dim=1).mean().item()) for x, calls in results]
    slopes = {name: _slope(found[name][2:]) for name in found}
    figure, top = sheet(WIDTH, 480, "How fast solvers converge", f"{world} · Karras's noise levels")
    with styled():
        axes = axes_at(figure, MARGIN + 60, top + 30, WIDTH - 2 * MARGIN - 60, 330)
        for name, title in SOLVERS.items():
            label = f"{title}: twice the calls, {2 ** -slopes[name]:.1f} times less error"
            axes.loglog(*zip(*found[name]), "o-", label=label)
        axes.set(xlabel="calls of the network", ylabel="mean distance from the exact solution")
        axes.set_xticks([6, 10, 20, 40, 80], ["6", "10", "20", "40", "80"], minor=False)
        axes.minorticks_off()
        axes.legend()
    steep = [title for name, title in SOLVERS.items() if slopes[name] < min(slopes.values()) + 0.1]
    alt = one_line(f"""
        Error against calls on logarithmic axes, lines that fall. Euler's has a slope of
        {slopes["euler"]:.1f}, Heun's {slopes["heun"]:.1f}, DPM-Solver++'s {slopes["dpmpp_2m"]:.1f};
        {" and ".join(steep)} {"fall" if len(steep) > 1 else "falls"} the steepest.""")
    numbers: dict[str, Any] = {"slopes": slopes, "errors": {name: dict(x) for name, x in found.items()}}
    return Exhibit(figure, "How fast solvers converge", alt, GUIDE["toy-orders"], numbers)


def _slope(rows: Sequence[tuple[int, float]]) -> float:
    """The slope of a line through the logarithms."""
    calls, errors = np.log(np.asarray(rows)).T
    return float(np.polyfit(calls, errors, 1)[0])


def _panel(axes: Axes, title: str = "") -> Axes:
    axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], title=title)
    axes.title.set_fontsize(9.5)
    axes.grid(False)
    return axes


EXHIBITS = {"noising": noising, "learning": learning, "paths": paths, "guidance": guidance, "orders": orders}
