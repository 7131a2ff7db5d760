"""From a prompt to a picture: words to vectors, noise to latents, many small steps, latents to pixels.

`StableDiffusion.denoise` is the first three of these stages, with the loop open to anyone who wants to watch;
`generate` is a few lines around it and ends with the fourth. What may be asked of them is in `request.py`.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from .config import ModelConfig
from .ddpm import Sampler, randn
from .finite import Watch, finite
from .guidance import Denoiser, Guidance
from .inpaint import begin, beside
from .pictures import fit, to_picture
from .prompts import warn_of_syntax
from .request import Request, ask
from .samplers import SAMPLERS


@dataclass(frozen=True)
class Step:
    """One turn of the denoising loop. Tensors are (B, 4, H/8, W/8), float32, as the sampler scales them."""

    index: int  # 0 … total - 1
    total: int
    t: float  # the timestep: how noisy x_t is, from 999 down; an int, except for rectified flow
    x_t: Tensor  # the latents before the step
    latents: Tensor  # the latents after the step; after the last, the picture's
    sampler: Sampler = field(repr=False)  # as it was before the step
    output: Tensor = field(repr=False)  # the network's output after guidance
    cond: Tensor = field(repr=False)  # … with the prompt
    uncond: Tensor | None = field(repr=False)  # … with the negative prompt

    @property
    def x0(self) -> Tensor:
        """The clean latents that the network sees in x_t; `decode` shows them."""
        return self.sampler.predict(self.t, self.x_t, self.output)[0]

    @property
    def eps(self) -> Tensor:
        """The noise that the network sees in x_t, after guidance."""
        return self.sampler.predict(self.t, self.x_t, self.output)[1]

    @property
    def eps_cond(self) -> Tensor:
        """The noise that the network sees with the prompt."""
        return self.sampler.predict(self.t, self.x_t, self.cond)[1]

    @property
    def eps_uncond(self) -> Tensor | None:
        """The noise that the network sees with the negative prompt; None in a step without guidance."""
        return None if self.uncond is None else self.sampler.predict(self.t, self.x_t, self.uncond)[1]


@dataclass
class StableDiffusion:
    """Four networks and the order in which they are used."""

    config: ModelConfig
    tokenizer: Any  # has .encode(text) -> list of token ids
    models: dict[str, nn.Module]  # "clip", "encoder", "decoder" and "diffusion"
    device: torch.device | str = "cpu"
    idle_device: torch.device | str | None = None  # where idle networks wait; None: on `device`
    around: Callable[[nn.Module], nn.Module] = lambda unet: unet  # stands in for the U-Net, anew in each loop

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.models["diffusion"])

    def generate(
        self,
        prompt: str | Sequence[str] | Request,
        negative: str | Sequence[str] | None = None,
        *,
        callback: Callable[[Step], Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws. The settings are the fields of `Request`; two more arguments do not change the picture.

        callback: called with each `Step`. It may raise, to end everything, or return False, to end early: the
        picture is then x0, which the network sees in the noise by now. progress: shows a bar on stderr.
        Returns a picture, or a list of them for a list of prompts or num > 1.
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
        self, prompt: str | Sequence[str] | Request, negative: Any = None, **settings: Any
    ) -> Generator[Step, Tensor | None, None]:
        """The loop of `generate`, one `Step` at a time; the settings are the fields of `Request`.

        Latents that the caller sends back, `steps.send(latents)`, take the place of the step's own.
        """
        request = ask(prompt, negative, **settings).for_model(self.config)
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        sampler = self.sampler(request, generators)
        # 1. Text encoding: B prompts -> (B, 77, 768), and as many negative ones
        positive, negative = self.encode_words(request)
        # 2. Latent initialisation: (B, 4, H/8, W/8), each picture's noise from its own seed
        noise = self._noise(request, generators)
        latents, step, extra = begin(self.config, request, sampler, noise, self.encode_image)
        with self._borrow("diffusion") as unet:
            denoiser = in_inference_mode(self.denoiser(self.around(unet), request))
            guided = self.guided(denoiser, extra, positive, negative, request)
            watch = Watch(unet)
            # 3. Denoising loop
            for index, t in enumerate(sampler.timesteps):
                x_t, before = latents, copy.copy(sampler)
                with torch.no_grad():
                    time = torch.full((1,), t.item(), dtype=torch.float32, device=self.device)
                    output, cond, uncond = guided(sampler.scale_model_input(x_t, t), time, sampler.sigma(t))
                    latents = step(t, x_t, output)
                total = len(sampler.timesteps)
                made = Step(index, total, t.item(), x_t, latents, before, output, cond, uncond)
                sent = yield watch(made)
                latents = latents if sent is None else sent
            watch.finish()

    def sampler(self, request: Request, generators: Sequence[torch.Generator] | None = None) -> Sampler:
        """The sampler that a request asks for, with the request's timesteps.

        generators: one for each picture of the request; None: made from its seeds.
        """
        request = request.for_model(self.config)
        generators = generators or [torch.Generator().manual_seed(seed) for seed in request.seeds]
        sampler = SAMPLERS[str(request.sampler)](generators, self.config.schedule)
        sampler.set_inference_timesteps(request.steps or self.config.steps)
        if request.init_image is not None:
            sampler.set_strength(request.strength)
        return sampler

    def encode_text(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """B prompts -> (B, 77, 768), in the dtype of the U-Net. The same prompt is encoded once."""
        if clip_skip >= self.config.clip.layers:
            raise ValueError(f"clip_skip must be less than {self.config.clip.layers}, not {clip_skip}")
        distinct = list(dict.fromkeys(prompts))
        warn_of_syntax(distinct)
        tokens = torch.tensor([self.tokenizer.encode(prompt) for prompt in distinct])  # (D, 77)
        with self._borrow("clip") as clip:
            encode = in_inference_mode(partial(clip, skip=clip_skip))
            context = finite(encode(tokens.to(self.device)), "the text encoder", clip)  # (D, 77, 768)
        return context[[distinct.index(prompt) for prompt in prompts]].to(self.dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8), float32: the mean; its noise is far below ours."""
        with self._borrow("encoder") as encoder:
            latents = in_inference_mode(encoder)(pixels.to(self.device, _dtype(encoder))).float()
            return finite(latents, "the VAE's encoder", encoder)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """(B, 4, H/8, W/8) -> B pictures, one by one: at full size, memory runs out first."""
        pictures = []
        with self._borrow("decoder") as decoder:
            for z in latents.to(self.device).split(1):
                pixels = decoder(z.to(dtype := _dtype(decoder)))
                if not pixels.isfinite().all() and z.isfinite().all():  # half precision ends at 65504
                    warnings.warn(f"the VAE overflowed in {dtype}: decoded again in float32", stacklevel=1)
                    pixels = decoder.float()(z.float())
                    decoder.to(dtype)
                if not z.isfinite().all():
                    raise FloatingPointError("the latents overflowed; try float32, or less guidance")
                pictures.append(to_picture(finite(pixels, "the VAE's decoder", decoder)[0]))
        return pictures

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        """The U-Net, as the loop calls it for a request."""
        return lambda x, context, t: unet(x.to(_dtype(unet)), context, t)

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

    def _noise(self, request: Request, generators: Sequence[torch.Generator]) -> Tensor:
        """The noise to begin with: (B, 4, H/8, W/8), float32."""
        (width, height), vae = cast("tuple[int, int]", request.size), self.config.vae
        shape = (len(generators), vae.latent_channels, height // vae.factor, width // vae.factor)
        noise = randn(shape, generators)
        if request.noise is not None:  # the generators have moved on all the same, so later noise is not this
            if request.noise.shape != noise.shape:
                raise ValueError(f"noise must be {tuple(noise.shape)}, not {tuple(request.noise.shape)}")
            noise = request.noise.float()
        return noise.to(self.device)

    @contextmanager
    def _borrow(self, name: str) -> Generator[nn.Module, None, None]:
        """A network, on the device while in use and on idle_device afterwards."""
        try:
            yield self.models[name].to(self.device)
        finally:
            if self.idle_device is not None:
                self.models[name].to(self.idle_device)


def in_inference_mode(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The network without derivatives, at full speed. Its output is an ordinary tensor, fit for a graph."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            output = network(*inputs)
        return output.clone()

    return run


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


def generate(*args: Any, **settings: Any) -> Image.Image | list[Image.Image]:
    """Draws with a dict of networks. The arguments are those of `first_call.generate`."""
    from .first_call import generate

    return generate(*args, **settings)
