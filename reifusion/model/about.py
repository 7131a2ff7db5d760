"""A model in three lines, for people: as text, and for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pipeline import StableDiffusion


def about(pipe: StableDiffusion) -> str:
    """Returns what the model is, what it is made of, and how it draws."""
    config, size, dtype = pipe.config, pipe.config.size, str(pipe.dtype).removeprefix("torch.")
    counts = {name: sum(p.numel() for p in one.parameters()) for name, one in pipe.models.items()}
    networks = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in counts.items())
    return (
        f"{type(pipe).__name__} {config.name}: pictures of {size}×{size}, {dtype}, {pipe.device}\n"
        f"{sum(counts.values()) / 1e6:.1f} million parameters: {networks}\n"
        f"{config.sampler}, {config.steps} steps, cfg {config.cfg:g}; {config.schedule.prediction_type}"
    )


def about_html(pipe: StableDiffusion) -> str:
    """Returns the same three lines for notebooks."""
    first, *more = html.escape(about(pipe)).splitlines()
    return f"<b>{first}</b><br>{'<br>'.join(more)}"
