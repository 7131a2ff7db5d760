"""From a prompt to a picture: words to vectors, noise to latents, many small steps, latents to pixels.

`StableDiffusion.denoise` is the first three of these stages, with the loop open to anyone who wants to watch;
`generate` is a few lines around it and ends with the fourth. What may be asked of them is in `request.py`.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .about import about, about_html
from .ask import ask
from .asked import Asked, Prompt, Several
from .config import ModelConfig
from .ddpm import Sampler, exact, randn
from .finite import Watch, finite
from .guidance import Denoiser, Guidance
from .inpaint import as_large, begin, beside
from .modes import as_gradients_are as as_gradients_are
from .modes import decoded, dtype_of
from .noise import Source
from .pictures import fit, to_picture
from .prompts import warn_of_syntax
from .request import Request
from .samplers import SAMPLERS
from .step import Step as Step
from .step import Turn as Turn
from .tuning import options
from .turns import in_each_turn

if TYPE_CHECKING:
    from typing_extensions import Unpack


def as_it_is(unet: nn.Module, request: Request) -> nn.Module:
    return unet


@dataclass(repr=False)
class StableDiffusion:
    """Four networks and the order in which they are used."""

    config: ModelConfig
    tokenizer: Any  # has .encode(text) -> list of token ids
    models: dict[str, nn.Module]  # "clip", "encoder", "decoder" and "diffusion"
    device: torch.device | str = "cpu"
    idle_device: torch.device | str | None = None  # where idle networks wait; None: on `device`
    around: Callable[[nn.Module, Request], nn.Module] = as_it_is  # stands in for the U-Net, anew in each loop

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.models["diffusion"])

    def __repr__(self) -> str:
        return about(self)

    def _repr_html_(self) -> str:
        return about_html(self)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
        self, prompt: str, negative: Prompt | None = None, *, num: Literal[1] = 1,
        callback: Callable[[Step], Any] | None = None, progress: bool = True, **settings: Unpack[Asked],
    ) -> Image.Image: ...  # fmt: skip

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Request, negative: Prompt | None = None, *,
        callback: Callable[[Step], Any] | None = None, progress: bool = True, **settings: Unpack[Several],
    ) -> Image.Image | list[Image.Image]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: Sequence[str] | Tensor, negative: Prompt | None = None, *,
        callback: Callable[[Step], Any] | None = None, progress: bool = True, **settings: Unpack[Several],
    ) -> list[Image.Image]: ...  # fmt: skip

    def generate(
        self,
        prompt: Prompt | Request,
        negative: Prompt | None = None,
        *,
        callback: Callable[[Step], Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws. The settings are the fields of `Request`; two more arguments do not change the picture.

        callback: called with each `Step`. It may raise, to end everything, or return False, to end early: the
        picture is then x0, which the network sees in the noise by now. progress: shows a bar on stderr.
        Returns a picture, or a list of them for num > 1, and always for a list of prompts and for vectors.
        """
        request = ask(prompt, negative, **settings).for_model(self.config)
        with closing(self.denoise(request)) as steps, tqdm(disable=not progress, unit="step") as bar:
            for step in steps:
                latents = step.latents
                bar.total = step.total
                bar.update()
                if callback is not None and callback(step) is False:
                    latents = step.x0
                    break
        # 4. Decoding: (B, 4, H/8, W/8) -> B pictures of H × W
        pictures = self.decode(latents)
        for k, picture in enumerate(pictures):
            if isinstance(request.init_image, Image.Image) and isinstance(request.mask, Image.Image):
                # The VAE alters every pixel a little; the pixels that were to be kept are put back.
                known, redraw = (fit(part, *picture.size) for part in (request.init_image, request.mask))
                pictures[k] = Image.composite(picture, known, redraw)
            pictures[k].info.update(prompt=request.prompts[k], seed=request.seeds[k])
        single = isinstance(request.prompt, str) and request.num == 1
        return pictures[0] if single else pictures

    def denoise(
        self,
        prompt: Prompt | Request,
        negative: Prompt | None = None,
        *,
        grad: bool = False,
        **settings: Unpack[Several],
    ) -> Generator[Step, Tensor | None, None]:
        """The loop of `generate`, one `Step` at a time; the settings are the fields of `Request`.

        Latents that the caller sends back, `steps.send(latents)`, take the place of the step's own, and so do
        those that are changed in place; but not between the calls of one step, where samplers like heun go on
        from where the step began. grad: all of a step has derivatives towards its x_t, and through the
        steps before it, unless the caller sends `step.latents.detach()`.
        """
        request = ask(prompt, negative, **settings).for_model(self.config)
        generators = request.generators()
        sampler = self.sampler(request, generators)
        # 1. Text encoding: B prompts -> (B, 77, 768), and as many negative ones
        words = in_each_turn(request, self.encode_words(request), len(sampler.timesteps))
        # 2. Latent initialisation: (B, 4, H/8, W/8), each picture's noise from its own seed
        noise = self._noise(request, generators)
        latents, step, extra = begin(self.config, request, sampler, noise, self.encode_image)
        with self.borrow("diffusion") as unet:
            denoiser = as_gradients_are(self.denoiser(self.around(unet, request), request))
            network, watch = beside(denoiser, extra), Watch(unet)
            # 3. Denoising loop
            for index, (t, (positive, negative)) in enumerate(zip(sampler.timesteps, words)):
                x_t = latents if latents.requires_grad or not grad else latents.detach().requires_grad_()
                turn = Turn(index, len(words), t.item(), x_t, copy.copy(sampler), positive, network)
                with torch.set_grad_enabled(grad):
                    guided = self.guided(denoiser, extra, positive, negative, request)
                    output, cond, uncond = guided(turn.scaled, turn.time, turn.sigma)
                    if request.guide is not None:
                        output = as_large(request.guide(cond, uncond, turn), cond, "what guide returns")
                    latents = step(t, x_t, output)
                made = Step(**vars(turn), latents=latents, output=output, cond=cond, uncond=uncond)
                sent = yield watch(made)
                latents = latents if sent is None else as_large(sent, latents, "latents that are sent")
            watch.finish()

    def sampler(
        self, request: Request, generators: Sequence[torch.Generator | Source] | None = None
    ) -> Sampler:
        """The sampler that a request asks for, with the request's timesteps.

        generators: one for each picture of the request; None: made from its seeds.
        """
        request = request.for_model(self.config)
        generators = generators or request.generators()
        sampler = SAMPLERS[str(request.sampler)](generators, self.config.schedule)
        vars(sampler).update(options(request))
        sampler.set_inference_timesteps(request.steps or self.config.steps, request.schedule)
        if request.latents is not None:
            sampler.skip(request.start)
        elif request.init_image is not None:
            sampler.set_strength(request.strength)
        return sampler

    def encode_text(self, prompts: Sequence[str], clip_skip: int = 0, *, grad: bool = False) -> Tensor:
        """B prompts -> (B, 77, 768), in the dtype of the U-Net. The same prompt is encoded once.

        grad: the vectors have derivatives towards the text encoder's weights.
        """
        distinct = list(dict.fromkeys(prompts))
        warn_of_syntax(distinct)
        with torch.set_grad_enabled(grad):
            context = self.vectors(distinct, clip_skip)  # (D, 77, 768)
            return context[[distinct.index(prompt) for prompt in prompts]].to(self.dtype)

    def vectors(self, prompts: Sequence[str], clip_skip: int) -> Tensor:
        """B prompts -> (B, 77, 768), in the dtype of the text encoder."""
        if clip_skip >= self.config.clip.layers:
            raise ValueError(f"clip_skip must be less than {self.config.clip.layers}, not {clip_skip}")
        tokens = torch.tensor([self.tokenizer.encode(prompt) for prompt in prompts])  # (B, 77)
        with self.borrow("clip") as clip:
            encode = as_gradients_are(partial(clip, skip=clip_skip))
            return finite(encode(tokens.to(self.device)), "the text encoder", clip)

    def encode_image(self, pixels: Tensor, *, grad: bool = False) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8), float32: the mean; its noise is far below ours.

        grad: the latents have derivatives towards pixels and weights.
        """
        with self.borrow("encoder") as encoder, torch.set_grad_enabled(grad):
            encode = as_gradients_are(encoder)
            latents = exact(encode(pixels.to(self.device, dtype_of(encoder))))
            return finite(latents, "the VAE's encoder", encoder)

    def decode_image(self, latents: Tensor, *, grad: bool = False) -> Tensor:
        """(B, 4, H/8, W/8) -> (B, 3, H, W) in about [-1, 1], one by one: at full size, memory runs out first.

        grad: the pixels have derivatives towards latents and weights.
        """
        with self.borrow("decoder") as decoder, torch.set_grad_enabled(grad):
            return torch.cat([decoded(decoder, z) for z in latents.to(self.device).split(1)])

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """(B, 4, H/8, W/8) -> B pictures"""
        return [to_picture(pixels) for pixels in self.decode_image(latents)]

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        """The U-Net, as the loop calls it for a request."""
        return lambda x, context, t: unet(x.to(dtype_of(unet)), context, t)

    def guided(
        self, denoiser: Denoiser, extra: Tensor | None, positive: Tensor, negative: Tensor | None,
        request: Request,
    ) -> Guidance:  # fmt: skip
        """The denoiser with the extra channels that it sees, and with guidance."""
        return Guidance(beside(denoiser, extra), positive, negative, *request.guidance)

    def encode_words(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Encodes the prompts and, for guidance, the negative prompts: each (B, 77, 768)."""
        if request.cfg == 1:
            return self.encode_text(request.prompts, request.clip_skip), None
        positive, negative = self.encode_text(request.prompts + request.negatives, request.clip_skip).chunk(2)
        return positive, negative

    def _noise(self, request: Request, generators: Sequence[torch.Generator | Source]) -> Tensor:
        """The noise to begin with: (B, 4, H/8, W/8), float32 or float64."""
        (width, height), vae = cast("tuple[int, int]", request.size), self.config.vae
        shape = (len(generators), vae.latent_channels, height // vae.factor, width // vae.factor)
        noise = randn(shape, generators).to(self.device, torch.promote_types(self.dtype, torch.float32))
        # The generators have moved on all the same, so that later noise is not this.
        return noise if request.noise is None else as_large(request.noise, noise, "noise")

    @contextmanager
    def borrow(self, name: str) -> Generator[nn.Module, None, None]:
        """A network, on the device while in use and on idle_device afterwards."""
        try:
            yield self.models[name].to(self.device)
        finally:
            if self.idle_device is not None:
                self.models[name].to(self.idle_device)


def generate(*args: Any, **settings: Any) -> Image.Image | list[Image.Image]:
    """Draws with a dict of networks. The arguments are those of `first_call.generate`."""
    from .first_call import generate

    return generate(*args, **settings)
