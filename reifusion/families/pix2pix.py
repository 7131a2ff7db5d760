"""Models that edit a picture by words: the U-Net sees the picture's latents beside the noise, in 8 channels.

Brooks, Holynski & Efros 2023, "InstructPix2Pix", arXiv:2211.09800. The prompt says what is to change. There
are two guidance scales, one for the words and one for the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..model.ddpm import exact
from ..model.guidance import Denoiser, Guidance, rescaled
from ..model.inpaint import beside
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .sdxl import StableDiffusionXL


@dataclass
class ImageGuidance(Guidance):
    """A denoiser that follows the words, and the picture that it edits, more closely than the network."""

    picture: Tensor = field(kw_only=True)  # the latents of the picture to edit, (1, 4, h, w)
    image_scale: float = field(kw_only=True)  # s_I in Eq. 3

    def __call__(self, x: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, 4, h, w), t (1,), σ -> the guided output, with words and picture, with the picture alone"""
        low, high = self.interval
        picture = self.picture.to(x.dtype).expand_as(x)
        if self.negative is None or not low < sigma <= high:
            output = exact(self.denoiser(torch.cat([x, picture], dim=1), self.positive, t))
            return output, output, None
        shown = torch.cat([picture, picture, torch.zeros_like(picture)])  # (3B, 4, h, w)
        words = torch.cat([self.positive, self.negative, self.negative])  # (3B, S, width)
        seen = torch.cat([torch.cat([x, x, x]), shown], dim=1)  # (3B, 8, h, w)
        both, image, neither = exact(self.denoiser(seen, words, t)).chunk(3)
        # Eq. 3, Brooks et al. 2023: ε = ε(∅, ∅) + s_I (ε(c_I, ∅) - ε(∅, ∅)) + s_T (ε(c_I, c_T) - ε(c_I, ∅))
        output = neither + self.image_scale * (image - neither) + self.scale * (both - image)
        return rescaled(output, both, self.rescale), both, image


class InstructPix2Pix(StableDiffusion):
    """A model that edits the init image as the prompt says."""

    def encode_words(self, request: Request) -> tuple[Tensor, Tensor | None]:
        if request.cfg == 1 and request.image_guidance == 1:
            return self.encode_text(request.prompts, request.clip_skip), None
        words = self.encode_text(request.prompts + request.negatives, request.clip_skip)
        positive, negative = words.chunk(2)
        return positive, negative

    def guided(
        self,
        denoiser: Denoiser,
        extra: Tensor | None,
        positive: Tensor,
        negative: Tensor | None,
        request: Request,
    ) -> Guidance:
        if extra is None or request.image_guidance is None or request.image_guidance == 1:
            return Guidance(beside(denoiser, extra), positive, negative, *request.guidance)
        return ImageGuidance(
            denoiser, positive, negative, *request.guidance, picture=extra, image_scale=request.image_guidance
        )


class InstructPix2PixXL(StableDiffusionXL, InstructPix2Pix):
    """The same for Stable Diffusion XL."""
