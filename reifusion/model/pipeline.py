"""From a prompt to a picture: words to vectors, noise to latents, many small steps, latents to pixels.

`StableDiffusion.denoise` is the first three of these stages, with the loop open to whoever wants to watch;
`generate` is a few lines around it and ends with the fourth. What may be asked of them is in `request.py`.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from .attention import Words
from .clip import Tokenizer
from .config import MINI, SD15, ModelConfig
from .ddpm import Sampler, randn
from .deepcache import DeepCache
from .diffusion import UNet
from .request import Picture, Request
from .samplers import SAMPLERS
from .tome import TokenMerging


@dataclass(frozen=True)
class Step:
    """One turn of the denoising loop. Tensors are (B, 4, H/8, W/8), float32, as the sampler scales them."""

    index: int  # 0 … total - 1
    total: int
    t: float  # the timestep: how noisy x_t is, from 999 down; an int, but for rectified flow
    x_t: Tensor  # the latents before the step
    x0: Tensor  # the clean latents that the network sees in them; `decode` shows them
    eps: Tensor  # the noise it sees, after guidance
    eps_cond: Tensor  # … with the prompt
    eps_uncond: Tensor | None  # … with the negative prompt; None without guidance, or outside its interval
    latents: Tensor  # the latents after the step; after the last, the picture's


@dataclass
class StableDiffusion:
    """Four networks and the order in which they are used."""

    config: ModelConfig
    tokenizer: Any  # has .encode(text) -> list of token ids
    models: dict[str, nn.Module]  # the seed's dict: clip, encoder, decoder, diffusion
    device: torch.device | str = "cpu"
    idle_device: torch.device | str | None = None  # where networks wait while not in use; None: there

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.models["diffusion"])

    def generate(
        self,
        prompt: str | Sequence[str] | Request,
        *args: Any,
        callback: Callable[[Step], Any] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Image.Image | list[Image.Image]:
        """Draws. The arguments are the fields of `Request`, and two more that do not change the picture:

        callback is called with each `Step`. It may raise, to end all, or return False, to end early: the
        picture is then what the network sees in the noise by now (x0). progress shows a bar on stderr.
        Returns a picture, or a list of them for a list of prompts or num_images > 1.
        """
        request = prompt if isinstance(prompt, Request) else Request(prompt, *args, **settings)
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
            if request.picture is not None and request.redraw is not None:
                # The VAE alters every pixel a little; those that were to be kept are put back.
                kept, redraw = (fit(part, *picture.size) for part in (request.picture, request.redraw))
                pictures[k] = Image.composite(picture, kept, redraw)
            pictures[k].info.update(prompt=request.prompts[k], seed=request.seeds[k])
        single = isinstance(request.prompt, str) and request.num_images == 1
        return pictures[0] if single else pictures

    @torch.inference_mode()  # also while the generator runs, but not in between, in its caller
    def denoise(
        self, prompt: str | Sequence[str] | Request, *args: Any, **settings: Any
    ) -> Generator[Step, None, None]:
        """The loop of `generate`, one `Step` at a time; the arguments are the fields of `Request`."""
        request = prompt if isinstance(prompt, Request) else Request(prompt, *args, **settings)
        width, height = request.size(self.config)
        generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
        sampler = self._sampler(request, generators)
        # A distilled network (an LCM) is told how strong guidance is, and needs no second half.
        distilled = self.config.unet.guidance_width is not None
        scale = torch.tensor([request.cfg_scale if request.do_cfg else 1.0], device=self.device)
        guided = request.do_cfg and request.cfg_scale != 1 and not distilled

        # 1. Text encoding: B prompts -> (B, 77, 768); with guidance (2B, 77, 768), the negative prompts last
        context = self.encode_text(request.prompts + request.negatives * guided, request.clip_skip)

        # 2. Latent initialisation: (B, 4, H/8, W/8), each picture's noise from its own seed
        channels, factor = self.config.vae.latent_channels, self.config.vae.factor
        noise = randn((len(generators), channels, height // factor, width // factor), generators)
        if request.noise is not None:  # the generators have gone on all the same: later noise is not this one
            if request.noise.shape != noise.shape:
                raise ValueError(f"noise must be {tuple(noise.shape)}, not {tuple(request.noise.shape)}")
            noise = request.noise.float()
        noise = noise.to(self.device)
        original = mask = None
        if request.picture is None:
            latents = noise * sampler.init_noise_sigma
        else:  # the picture, under as much noise as strength asks for
            original, mask = self._encode_input(request, width, height)
            sampler.set_strength(request.strength)
            latents = sampler.add_noise(original.expand_as(noise), sampler.timesteps[0], noise)
        extra = self._extra_channels(request, width, height)

        # 3. Denoising loop
        words, positive = Words(context), Words(context[: len(latents)])
        with self._borrow("diffusion") as unet:
            call = _shortened(unet, request)
            for index, t in enumerate(sampler.timesteps):
                # §3, Kynkäänniemi et al. 2024: the weight is w for σ in (σ_lo, σ_hi], outside it is 1: none
                guides = guided and request.guided_from < _sigma(sampler, t) <= request.guided_to
                x = sampler.scale_model_input(latents, t)
                if extra is not None:
                    x = torch.cat([x, extra.expand(len(x), -1, -1, -1)], dim=1)
                # x (B, …) under 2B prompts -> (2B, …): both halves of the guidance in one pass
                spoken = words if guides else positive
                told = [t.float().reshape(1).to(self.device), *[scale] * distilled]
                output = call(x.to(_dtype(unet)), spoken, *told).float()
                cond, uncond = output.chunk(2) if guides else (output, None)
                if uncond is not None:
                    # [guidance] Eq. 6, Ho & Salimans 2022, s = 1 + w: ε = ε_uncond + s (ε_cond - ε_uncond)
                    output = uncond + request.cfg_scale * (cond - uncond)
                    output = _rescaled(output, cond, request.guidance_rescale)
                x0, eps = sampler.predict(t, latents, output)
                eps_cond = sampler.predict(t, latents, cond)[1]
                eps_uncond = None if uncond is None else sampler.predict(t, latents, uncond)[1]
                after = sampler.step(t, latents, output)
                if original is not None and mask is not None and extra is None:
                    # Eq. 8, Lugmayr et al. 2022: what is known stays, only as noisy as all the rest
                    later = sampler.timesteps[index + 1 : index + 2]
                    known = sampler.add_noise(original, later, noise) if len(later) else original
                    after = mask * after + (1 - mask) * known
                total = len(sampler.timesteps)
                yield Step(index, total, t.item(), latents, x0, eps, eps_cond, eps_uncond, after)
                latents = after

    @torch.inference_mode()
    def encode_text(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        """B prompts -> (B, 77, 768), in the dtype of the U-Net. The same prompt is encoded once."""
        if clip_skip >= self.config.clip.layers:
            raise ValueError(f"clip_skip must be less than {self.config.clip.layers}, not {clip_skip}")
        distinct = list(dict.fromkeys(prompts))
        tokens = torch.tensor([self.tokenizer.encode(prompt) for prompt in distinct])  # (D, 77)
        with self._borrow("clip") as clip:
            context = clip(tokens.to(self.device), skip=clip_skip)  # (D, 77) -> (D, 77, 768)
        return context[[distinct.index(prompt) for prompt in prompts]].to(self.dtype)

    @torch.inference_mode()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4, H/8, W/8), float32: the mean; its noise is far below ours."""
        with self._borrow("encoder") as encoder:
            return encoder(pixels.to(self.device, _dtype(encoder))).float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """(B, 4, H/8, W/8) -> B pictures, one by one: at full size, memory is what runs out first."""
        pictures = []
        with self._borrow("decoder") as decoder:
            for z in latents.to(self.device).split(1):
                pixels = decoder(z.to(dtype := _dtype(decoder)))
                if not pixels.isfinite().all() and z.isfinite().all():  # half precision ends at 65504
                    warnings.warn(f"the VAE overflowed in {dtype}: decoded again in float32", stacklevel=1)
                    pixels = decoder.float()(z.float())
                    decoder.to(dtype)
                if not pixels.isfinite().all():
                    raise FloatingPointError("the latents overflowed; try float32, or less guidance")
                pictures.append(to_picture(pixels[0]))
        return pictures

    def _encode_input(self, request: Request, width: int, height: int) -> tuple[Tensor, Tensor | None]:
        """The input image's latents (1, 4, H/8, W/8), and its mask (1, 1, H/8, W/8): 1 is redrawn."""
        assert request.picture is not None
        original = self.encode_image(to_tensor(fit(request.picture, width, height)))
        if request.redraw is None:
            return original, None
        redraw = (to_tensor(fit(request.redraw, width, height)) + 1) / 2  # (1, 1, H, W)
        # A latent stands for 8×8 pixels, and is redrawn as soon as one of them is.
        return original, F.max_pool2d(redraw, self.config.vae.factor).to(self.device)

    def _extra_channels(self, request: Request, width: int, height: int) -> Tensor | None:
        """What a U-Net made for inpainting sees beside x, (1, 5, H/8, W/8): mask, picture without it."""
        vae = self.config.vae
        if self.config.unet.in_channels == vae.latent_channels:
            return None
        pixels, redraw = torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width)
        if request.picture is not None and request.redraw is not None:
            pixels = to_tensor(fit(request.picture, width, height))
            redraw = (to_tensor(fit(request.redraw, width, height)) >= 0).float()
        rest = self.encode_image(pixels * (1 - redraw))
        return torch.cat([F.max_pool2d(redraw, vae.factor).to(self.device), rest], dim=1)

    def _sampler(self, request: Request, generators: list[torch.Generator]) -> Sampler:
        sampler = SAMPLERS[request.sampler(self.config)](generators, **asdict(self.config.schedule))
        sampler.set_inference_timesteps(request.n_inference_steps)
        return sampler

    @contextmanager
    def _borrow(self, name: str) -> Generator[nn.Module, None, None]:
        """A network, on the device while in use and on idle_device afterwards."""
        try:
            yield self.models[name].to(self.device)
        finally:
            if self.idle_device is not None:
                self.models[name].to(self.idle_device)


def _sigma(sampler: Sampler, t: Tensor) -> float:
    """σ, the noise beside one part of signal, by what the sampler makes of the one and of the other."""
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    return (sampler.add_noise(zero, t, one) / sampler.add_noise(one, t, zero)).item()


def _shortened(unet: nn.Module, request: Request) -> Callable[..., Tensor]:
    """The U-Net, or what is asked to stand in for it."""
    call: Callable[..., Tensor] = unet
    if request.deepcache > 1:
        call = DeepCache(cast(UNet, unet), request.deepcache)
    return TokenMerging(unet, request.tome, call) if request.tome else call


def _rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """The guided prediction (B, …), its contrast brought nearer to that of cond, by φ in [0, 1]."""
    if phi == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    # Eq. 15, Lin et al. 2023: x_rescaled = x_cfg σ_pos / σ_cfg, with each image's own σ
    rescaled = guided * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    # Eq. 16: x_final = φ x_rescaled + (1 - φ) x_cfg
    return phi * rescaled + (1 - phi) * guided


def _dtype(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


# The way in

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    source: str | os.PathLike = "mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> StableDiffusion:
    """A model, ready to draw.

    source: "mini", a .safetensors or .ckpt file, a folder of diffusers, or a hub id "owner/name". device:
    None for the best there is. dtype: a torch.dtype, "bf16", "fp16" or "fp32"; None for what suits the
    device. Raises ValueError, in one sentence, for what is no model (`ModelError`), device or dtype.
    """
    from .model_loader import load as load_networks

    device = _device(device)
    source = source if isinstance(source, str) else os.fspath(source)
    config, models, tokenizer = load_networks(source, device, _parse_dtype(dtype, device))
    for network in models.values():
        # The order in memory in which convolutions are fastest.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return StableDiffusion(config, tokenizer, models, device)


def _device(device: torch.device | str | None) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, there in available.items() if there))
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {device!r}; there are {', '.join(available)}") from None
    if not available.get(device.type, True):
        raise ValueError(f"PyTorch finds no {device.type} device on this machine")
    return device


def _parse_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        # On CPUs bfloat16 is only fast where it is built in, as AVX-512 or AMX.
        built_in = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        dtype = {"cuda": "fp16", "cpu": "bf16" if built_in else "fp32"}.get(device.type, "fp32")
    for short, known in DTYPES.items():
        if dtype in (short, known, str(known).removeprefix("torch.")):
            return known
    raise ValueError(f"there is no dtype {dtype!r}; there are {', '.join(DTYPES)}")


@functools.lru_cache(maxsize=1)
def _mini(device: torch.device | str | None) -> StableDiffusion:
    return load(device=device)


def generate(
    prompt: str | Sequence[str],
    uncond_prompt: str | Sequence[str] | None = None,
    input_image: Picture | None = None,
    strength: float = 0.8,
    do_cfg: bool = True,
    cfg_scale: float = 7.5,
    sampler_name: str = "ddpm",
    n_inference_steps: int = 50,
    models: Mapping[str, nn.Module] | StableDiffusion | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    idle_device: torch.device | str | None = None,
    tokenizer: Any = None,
    *,
    height: int | None = None,
    width: int | None = None,
    num_images: int = 1,
    mask: Picture | None = None,
    clip_skip: int = 0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    deepcache: int = 1,
    tome: float = 0.0,
    callback: Callable[[Step], Any] | None = None,
    progress: bool = True,
) -> Image.Image | list[Image.Image]:
    """Draws, with the seed's call: `StableDiffusion.generate` without a `StableDiffusion`.

    sampler_name: the default gives way to "flow" for a model trained for that. models: the seed's dict of
    networks (clip, encoder, decoder, diffusion), a `StableDiffusion`, or None, the mini. device: None for
    where they are. idle_device: where networks wait while not in use. tokenizer: None for the models' own,
    which for a dict is CLIP's. The rest is that of `StableDiffusion.generate`.
    """
    if models is None:
        pipe = _mini(device)
    elif isinstance(models, StableDiffusion):
        pipe = models
    else:
        pipe = _from_networks(models, tokenizer)
        if device is None and idle_device is not None:
            device = _device(None)
    pipe = replace(
        pipe,
        tokenizer=tokenizer or pipe.tokenizer,
        device=pipe.device if device is None else _device(device),
        idle_device=idle_device or pipe.idle_device,
    )
    return pipe.generate(
        prompt,
        uncond_prompt,
        input_image,
        strength,
        do_cfg,
        cfg_scale,
        None if sampler_name == "ddpm" else sampler_name,
        n_inference_steps,
        seed,
        height=height,
        width=width,
        num_images=num_images,
        mask=mask,
        clip_skip=clip_skip,
        guidance_rescale=guidance_rescale,
        guidance_interval=guidance_interval,
        deepcache=deepcache,
        tome=tome,
        callback=callback,
        progress=progress,
    )


def _from_networks(models: Mapping[str, Any], tokenizer: Any) -> StableDiffusion:
    """Networks know their sizes; their schedule and size of picture are those of the preset they match."""
    clip, vae, unet = (models[name].config for name in ("clip", "decoder", "diffusion"))
    preset = next((known for known in (SD15, MINI) if (known.clip, known.unet) == (clip, unet)), SD15)
    if tokenizer is None and clip.vocab_size != SD15.clip.vocab_size:
        raise ValueError("these networks do not speak CLIP's vocabulary, so they need their own tokenizer")
    tokenizer = tokenizer or Tokenizer(context_length=clip.context_length)
    device = next(models["diffusion"].parameters()).device
    return StableDiffusion(replace(preset, clip=clip, vae=vae, unet=unet), tokenizer, dict(models), device)


# Pictures in and out


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled to cover width × height; what stands over at two sides is cut off evenly."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB or grey -> (1, 3 or 1, H, W), float32 in [-1, 1]"""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(*picture.size[::-1], -1)
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W), about [-1, 1] -> RGB, rounded: cutting off would darken everything by half a level."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
