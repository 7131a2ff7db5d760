"""A film of a picture that comes about: what the network sees in the noise, step by step, as an animation."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageOps

from .files import free, named, whole
from .model.pipeline import StableDiffusion, Step

FORMATS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}  # the last is an APNG
EACH, LAST = 120, 2000  # milliseconds that a step is shown, and the picture


def animated(path: str) -> Path:
    """Returns the path of a film. Raises ValueError if its ending is of no format that can be animated."""
    found = named(path)
    if found.suffix.lower() not in FORMATS:
        raise ValueError(f"a film ends in {', '.join(FORMATS)}, and not as {path}")
    return found


class Film:
    """Collects the steps of a drawing, as a callback of `generate`, and writes them.

    Every step but the last, which is the picture, is decoded; so at 512×512 on a CPU a film takes about as
    long again as its picture.
    """

    def __init__(self, pipe: StableDiffusion) -> None:
        self.pipe = pipe
        self.frames: list[Image.Image] = []

    def __call__(self, step: Step) -> None:
        if step.index + 1 < step.total:
            (frame, *_) = self.pipe.decode(step.x0)
            self.frames.append(frame)

    def save(self, path: Path, picture: Image.Image) -> Path:
        """Writes the steps and the picture at their end, to a path that is free yet; returns it.

        The picture decides the size; steps of another, as of a first pass, are fitted into it.
        """
        frames = [ImageOps.pad(one, picture.size, Image.Resampling.LANCZOS) for one in self.frames]
        first, *rest = [*frames, picture.convert("RGB")]
        times = [EACH] * len(frames) + [LAST]
        path.parent.mkdir(parents=True, exist_ok=True)
        path = free(path)
        with whole(path) as temporary:
            first.save(
                temporary, FORMATS[path.suffix.lower()], save_all=True, append_images=rest, duration=times,
                loop=0,
            )  # fmt: skip
        return path
