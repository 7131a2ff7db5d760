"""How much one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.request import Request
from ..settings import Settings
from .errors import Refusal


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for; what is above is refused with status 400, or 413 for the body."""

    side: int = 2048  # pixels, of width and height
    pixels: int = 2_400_000  # of a picture, after its second pass
    steps: int = 150
    pictures: int = 10  # in a request
    work: int = 1_000_000_000  # pixels × steps × pictures of a request
    prompt: int = 8_000  # letters
    loras: int = 8
    body: int = 32 * 2**20  # bytes
    input_pixels: int = 2**24  # of a picture that is sent

    def check_asked(self, settings: Settings, pictures: int) -> None:
        """Raises Refusal for what can be told before the model's own settings are known."""
        self._most("prompt", len(settings.prompt or ""), self.prompt, "letters in the prompt")
        self._most("negative_prompt", len(settings.negative), self.prompt, "letters in the negative prompt")
        self._most("n", pictures, self.pictures, "pictures in a request")
        self._most("steps", settings.steps or 1, self.steps, "steps")
        self._most("lora", len(settings.lora), self.loras, "LoRAs")
        if pictures < 1:
            raise Refusal(400, "a request is for at least one picture", "n")

    def check_drawn(self, settings: Settings, request: Request, pictures: int) -> None:
        """Raises Refusal for too much work. request: with nothing left open."""
        width, height = request.size or (0, 0)
        width, height = int((width or 0) * settings.hires), int((height or 0) * settings.hires)
        self._most("size", max(width, height), self.side, "pixels at a side")
        self._most("size", width * height, self.pixels, "pixels in a picture")
        work = width * height * (request.steps or 1) * pictures
        self._most("n", work, self.work, "pixels × steps × pictures in a request")
        self._most("steps", request.steps or 1, self.steps, "steps")

    def _most(self, param: str, value: int, most: int, what: str) -> None:
        if value > most:
            raise Refusal(400, f"{value:,} {what} are too many; the most are {most:,}", param)
