"""Places by arithmetic, like flat illustrations: a meadow, snow, the sea, a room, the night and more.

`draw` returns pictures of places. A place looks the same for the same seed, and different for every other.
Lengths and positions are shares of the side; y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .colours import ramp

GROUND = 0.84  # where things stand
MOST = 256  # numbers that vary in a place: more than any place draws


def varying(seeds: Tensor, count: int) -> Tensor:
    """Numbers (N, count) between 0 and 1: the same for a seed on every device."""
    index = torch.arange(count, device=seeds.device)
    x = (seeds[:, None] * 1_000_003 + index * 7_919 + 12_345) & 0xFFFFFFFF
    for _ in range(3):  # multiply and fold, in integers: a hash
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x.double() / 2**32).float().clamp(max=1 - 2**-24)  # rounding could make it 1


class Brush:
    """Paints on N pictures at once; whatever varies is drawn from their seeds."""

    def __init__(self, seeds: Tensor, side: int):
        self.numbers, self.side, self.drawn = varying(seeds, MOST), side, 0
        self.at = (torch.arange(side, device=seeds.device) + 0.5) / side
        self.canvas = torch.ones(len(seeds), 3, side, side, device=seeds.device)

    # ---- what varies ----

    def random(self, count: int, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """Returns the next (N, count) numbers, between low and high."""
        self.drawn += count
        assert self.drawn <= MOST, "a place draws more numbers than there are"
        return low + (high - low) * self.numbers[:, self.drawn - count : self.drawn]

    def chance(self, probability: float) -> Tensor:
        """(N, 1, 1, 1): 1 with this probability, else 0."""
        return (self.random(1) < probability).float()[:, :, None, None]

    def tint(self, *colours: tuple[int, int, int], spread: float = 0.04) -> Tensor:
        """(N, 3, 1, 1): one of the colours, a little lighter or darker, warmer or colder."""
        table = torch.tensor(colours, device=self.at.device) / 255
        colour = table[(self.random(1)[:, 0] * len(colours)).long()]
        return (colour + self.random(1, -spread, spread) + self.random(3, -spread, spread) / 2)[
            :, :, None, None
        ]

    # ---- shapes: how much of each pixel is covered, (N, 1, S, S) ----

    def below(self, line: Tensor) -> Tensor:
        """What lies under a line y(x), (N, S)."""
        return ((self.at[:, None] - line[:, None, :]) * self.side + 0.5).clamp(0, 1)[:, None]

    def waves(self, height: float | Tensor, swing: float, slowest: float, fastest: float) -> Tensor:
        """A line (N, S) that swings softly around a height: hills, dunes, the edge of the sea."""
        frequency, phase = self.random(3, slowest, fastest), self.random(3, 0, 2 * math.pi)
        size = torch.tensor([0.6, 0.3, 0.1], device=self.at.device) * swing
        turns = 2 * math.pi * frequency[:, :, None] * self.at + phase[:, :, None]  # (N, 3, S)
        return height + (size[:, None] * turns.sin()).sum(1)

    def peaks(self, base: float | Tensor, lowest: float, highest: float, count: int, width: float) -> Tensor:
        """A line (N, S) of pointed peaks on a base: mountains, or pine trees."""
        middle = (torch.arange(count, device=self.at.device) + self.random(count, 0.1, 0.9)) / count
        tall = self.random(count, lowest, highest)
        slope = (self.at - middle[:, :, None]).abs() / (width * tall[:, :, None] / highest)
        return base - (tall[:, :, None] * (1 - slope)).amax(1).clamp(min=0)

    def discs(self, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
        """Round spots, with x, y, radius (N, K); those that touch run together, as in a cloud."""
        # A Gaussian is a product of one in x and one in y, so all K of them are one product of matrices.
        across = (-((self.at - x[:, :, None]) ** 2) / radius[:, :, None] ** 2).exp()  # (N, K, S)
        down = (-((self.at - y[:, :, None]) ** 2) / radius[:, :, None] ** 2).exp()
        height = torch.einsum("nky,nkx->nyx", down, across)
        soft = (0.8 / (self.side * radius.mean(1)))[:, None, None].clamp(max=0.3)
        return ((height - math.exp(-1) + soft) / (2 * soft)).clamp(0, 1)[:, None]

    def glow(self, x: Tensor, y: Tensor, radius: float) -> Tensor:
        """Light around a point (N, 1), fading out."""
        across = (-((self.at - x) ** 2) / radius**2).exp()
        down = (-((self.at - y) ** 2) / radius**2).exp()
        return (down[:, :, None] * across[:, None, :])[:, None]

    def box(self, left: Tensor, top: Tensor, width: Tensor, height: Tensor) -> Tensor:
        """A rectangle, with sides (N, 1)."""

        def within(start: Tensor, length: Tensor) -> Tensor:
            return ((length / 2 - (self.at - start - length / 2).abs()) * self.side + 0.5).clamp(0, 1)

        return (within(top, height)[:, :, None] * within(left, width)[:, None, :])[:, None]

    # ---- paint ----

    def paint(self, cover: Tensor, colour: Tensor) -> None:
        self.canvas = self.canvas.lerp(colour.expand_as(self.canvas), cover.expand_as(self.canvas))

    def fade(self, top: Tensor, bottom: Tensor, ends: float = 1.0) -> Tensor:
        """A colour that changes from the top to where it ends."""
        return top.lerp(bottom, (self.at / ends).clamp(max=1)[:, None])

    def ground(self, line: Tensor, near: Tensor, light: float = 0.08) -> None:
        """Land under a line, lighter at its edge."""
        depth = (self.at[:, None] - line[:, None, :])[:, None].clamp(min=0)
        self.paint(self.below(line), near + light * (1 - ramp(depth, 0.0, 0.22)))

    def sun(self, colour: Tensor, chance: float = 0.6) -> None:
        x, y = self.random(1, 0.12, 0.88), self.random(1, 0.1, 0.25)
        shown = self.chance(chance)
        self.paint(shown * 0.5 * self.glow(x, y, 0.18), colour)
        self.paint(shown * self.discs(x, y, self.random(1, 0.05, 0.08)), colour)

    def clouds(self, colour: Tensor, count: int = 2) -> None:
        for _ in range(count):
            x, y = self.random(1, 0.05, 0.95), self.random(1, 0.08, 0.3)
            radius = self.random(4, 0.025, 0.05)
            puffs = x + torch.tensor([-0.07, -0.025, 0.025, 0.07], device=x.device) * self.random(1, 0.7, 1.1)
            cloud = self.discs(puffs, y - radius / 2, radius) * (1 - self.below(y.expand(-1, self.side)))
            self.paint(0.9 * self.chance(0.75) * cloud, colour)

    def specks(
        self, count: int, colour: Tensor, top: float, bottom: float, small: float, large: float
    ) -> None:
        """Flakes, stars, flowers, bubbles."""
        x, y = self.random(count, 0.02, 0.98), self.random(count, top, bottom)
        self.paint(self.discs(x, y, self.random(count, small, large)), colour)


def _meadow(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((120, 196, 244)), b.tint((222, 242, 252)), 0.6))
    b.sun(b.tint((255, 222, 92)))
    b.clouds(b.tint((255, 255, 255), spread=0.0))
    b.ground(b.waves(b.random(1, 0.42, 0.5), 0.07, 0.6, 1.6), b.tint((146, 198, 150)))
    b.ground(b.waves(b.random(1, 0.52, 0.58), 0.06, 0.5, 1.4), b.tint((112, 184, 96)))
    b.ground(b.waves(b.random(1, 0.64, 0.7), 0.04, 0.4, 1.1), b.tint((92, 170, 72)))
    b.specks(14, b.tint((255, 255, 255), (255, 226, 96), (250, 160, 190)), 0.74, 0.98, 0.008, 0.013)


def _snow(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((160, 200, 232)), b.tint((228, 240, 250)), 0.6))
    b.ground(b.peaks(0.6, 0.12, 0.34, 5, 0.3), b.tint((172, 196, 224)), 0.12)
    b.ground(
        b.peaks(b.random(1, 0.6, 0.64), 0.05, 0.15, 14, 0.035), b.tint((96, 142, 150), (88, 128, 150)), 0.0
    )
    b.ground(b.waves(b.random(1, 0.58, 0.64), 0.03, 0.4, 1.2), b.tint((222, 234, 246), spread=0.015), 0.05)
    b.ground(b.waves(b.random(1, 0.7, 0.76), 0.03, 0.4, 1.0), b.tint((238, 245, 252), spread=0.01), 0.04)
    b.specks(30, b.tint((255, 255, 255), spread=0.0), 0.0, 0.95, 0.006, 0.012)


def _sea(b: Brush) -> None:
    evening = b.chance(0.3)
    top = b.tint((128, 204, 246)).lerp(b.tint((250, 186, 150)), evening)
    b.paint(b.canvas, b.fade(top, b.tint((232, 246, 252)).lerp(b.tint((255, 236, 206)), evening), 0.45))
    b.sun(b.tint((255, 220, 100)))
    b.clouds(b.tint((255, 255, 255), spread=0.0))
    horizon = b.random(1, 0.4, 0.48).expand(-1, b.side)
    water, deep = b.tint((44, 136, 200)), b.tint((70, 190, 216))
    b.paint(b.below(horizon), b.fade(water, deep, 0.75))
    x, y, width = b.random(7, -0.1, 0.9), b.random(7, 0.5, 0.66), b.random(7, 0.08, 0.24)
    for k in range(7):  # crests
        one = slice(k, k + 1)
        b.paint(
            0.45 * b.box(x[:, one], y[:, one], width[:, one], torch.full_like(width[:, one], 0.008)),
            deep + 0.2,
        )
    shore = b.waves(b.random(1, 0.7, 0.74), 0.025, 0.5, 1.6)
    b.paint(0.85 * b.below(shore - 0.022), torch.ones_like(deep))
    b.ground(shore, b.tint((244, 216, 160)), -0.05)


def _room(b: Brush) -> None:
    wall = b.tint((246, 224, 198), (206, 226, 236), (218, 232, 206), (240, 208, 208), (226, 216, 240))
    b.paint(b.canvas, b.fade(wall + 0.02, wall - 0.03))
    left = b.random(1, 0.06, 0.14) + (b.random(1) < 0.5) * 0.5
    top, width, height = b.random(1, 0.1, 0.16), b.random(1, 0.26, 0.32), b.random(1, 0.24, 0.32)
    frame = torch.full_like(left, 0.022)
    wood = b.tint((255, 255, 255), (176, 124, 84))
    b.paint(b.box(left, top, width, height), wood)
    pane = b.box(left + frame, top + frame, width - 2 * frame, height - 2 * frame)
    b.paint(pane, b.fade(b.tint((124, 192, 240)), b.tint((214, 238, 250)), 0.5))
    b.paint(b.box(left + width / 2 - frame / 4, top, frame / 2, height), wood)
    edge = b.random(1, 0.64, 0.7)
    floor = b.tint((196, 144, 98), (168, 118, 82), (214, 176, 132))
    b.paint(b.below(edge.expand(-1, b.side)), floor)
    for k in range(5):  # boards, wider the nearer they are
        y = edge + (1 - edge) * ((k + 0.6) / 5) ** 1.5
        b.paint(
            0.5 * b.box(torch.zeros_like(y), y, torch.ones_like(y), torch.full_like(y, 0.006)), floor - 0.12
        )
    b.paint(
        b.box(torch.zeros_like(edge), edge - 0.03, torch.ones_like(edge), torch.full_like(edge, 0.03)),
        wall + 0.1,
    )


def _night(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((20, 24, 72), spread=0.02), b.tint((72, 92, 168), spread=0.03), 0.65))
    b.specks(26, b.tint((255, 250, 220), spread=0.0), 0.0, 0.5, 0.004, 0.009)
    moon, x, y = b.tint((255, 244, 200), spread=0.01), b.random(1, 0.14, 0.86), b.random(1, 0.12, 0.24)
    b.paint(0.4 * b.glow(x, y, 0.16), moon)
    radius = b.random(1, 0.06, 0.085)
    crescent = b.discs(x, y, radius) * (
        1 - b.chance(0.5) * b.discs(x + 0.5 * radius, y - 0.3 * radius, radius)
    )
    b.paint(crescent, moon)
    b.ground(b.waves(b.random(1, 0.52, 0.58), 0.05, 0.6, 1.6), b.tint((58, 76, 140), spread=0.02), 0.03)
    b.ground(
        b.waves(b.random(1, 0.66, 0.7), 0.03, 0.4, 1.1),
        b.tint((106, 128, 186), (100, 140, 160), spread=0.03),
        0.1,
    )


def _forest(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((206, 232, 222)), b.tint((232, 244, 224)), 0.6))
    for height, colour, count, tall in ((0.62, (158, 200, 168), 9, 0.42), (0.68, (98, 160, 118), 7, 0.5)):
        b.ground(b.peaks(height, 0.5 * tall, tall, count, 0.1), b.tint(colour), 0.0)
    for middle in (b.random(1, -0.05, 0.1), b.random(1, 0.9, 1.05)):  # two trees near by
        wide, long = b.random(1, 0.04, 0.05), b.random(1, 0.12, 0.2)
        b.paint(b.box(middle - wide / 2, 0.76 - long, wide, long), b.tint((116, 84, 62)))
        crown = b.random(3, 0.09, 0.13)
        steps = torch.tensor([-0.07, 0.0, 0.07], device=wide.device)
        b.paint(b.discs(middle + steps, 0.72 - long - crown, crown), b.tint((58, 128, 76)))
    b.ground(b.waves(b.random(1, 0.68, 0.74), 0.03, 0.4, 1.2), b.tint((124, 172, 90), (142, 150, 92)))


def _desert(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((126, 200, 236), (250, 170, 120)), b.tint((254, 234, 200)), 0.55))
    b.sun(b.tint((255, 244, 206)), 0.9)
    b.ground(b.waves(b.random(1, 0.48, 0.54), 0.06, 0.5, 1.5), b.tint((232, 178, 116)))
    b.ground(b.waves(b.random(1, 0.58, 0.64), 0.06, 0.4, 1.2), b.tint((238, 194, 128)))
    b.ground(b.waves(b.random(1, 0.7, 0.74), 0.04, 0.4, 1.0), b.tint((246, 212, 150)))


def _under_water(b: Brush) -> None:
    b.paint(b.canvas, b.fade(b.tint((120, 212, 232)), b.tint((30, 96, 172)), 0.9))
    for _ in range(3):  # rays
        x = b.random(1, 0.0, 1.0)[:, :, None] + (b.at[:, None] * 0.35)
        ray = ((0.05 - (b.at - x).abs()) * b.side / 8).clamp(0, 1)[:, None]
        b.paint(0.16 * ray * (1 - b.at[:, None]), b.tint((255, 255, 255), spread=0.0))
    b.ground(b.waves(b.random(1, 0.78, 0.84), 0.03, 0.5, 1.4), b.tint((214, 200, 150), (150, 190, 180)), 0.06)
    b.specks(12, b.tint((206, 240, 250), spread=0.01), 0.05, 0.75, 0.007, 0.018)


# Place -> who draws it, how a caption says it, and the colours on which a subject must stand out there.
PLACES: dict[str, tuple[Callable[[Brush], None], Sequence[str], Sequence[str]]] = {
    "meadow": (_meadow, ("in a meadow", "on the grass", "on the hills"), ("green",)),
    "snow": (_snow, ("in the snow", "in the snow", "on a snowy day"), ()),
    "sea": (_sea, ("by the sea", "on the beach", "at the beach"), ("yellow",)),
    "room": (_room, ("in a room", "in a room", "at home"), ("orange",)),
    "night": (_night, ("at night", "at night", "under the stars"), ("black", "blue")),
    "forest": (_forest, ("in a forest", "in the woods", "in the forest"), ("green",)),
    "desert": (_desert, ("in the desert", "in a desert"), ("orange", "yellow")),
    "under water": (_under_water, ("under water", "under the sea"), ("blue",)),
}


def draw(places: Tensor, seeds: Tensor, side: int) -> Tensor:
    """Indices into PLACES (N,) and seeds (N,) -> pictures (N, 3, side, side) in [0, 1]."""
    pictures = torch.empty(len(places), 3, side, side, device=places.device)
    for k, (paint, _, _) in enumerate(PLACES.values()):
        these = (places == k).nonzero()[:, 0]
        if len(these):
            brush = Brush(seeds[these], side)
            paint(brush)
            pictures[these] = brush.canvas.clamp(0, 1)
    return pictures
