"""Famous bugs, to switch on and look at: real mistakes from public code, reproduced on the correct code.

Nothing in `model/` knows about them. Each bug is a few lines that replace a piece of `model/` while
`switched_on` lasts, with a number that gives the bug away and the test that would catch it.
`reifusion explain bugs` draws them all.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..bar import Bar
from ..families.sd3 import StableDiffusion3
from ..families.sdxl import StableDiffusionXL
from ..kernels import graphs
from ..model import attention, clip, ddpm, decoder, diffusion, encoder, pipeline, samplers
from ..model.pictures import to_tensor
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .experiments import difference, distance
from .figures import Exhibit, picture_grid, plain
from .guide import GUIDE
from .steer import swapped

Patches = Iterator[Any]  # context managers such as `patch` returns, to be entered together


@dataclass(frozen=True)
class Bug:
    name: str
    title: str  # what was done
    effect: str  # what the mistake does to pictures, and where it was found
    number: str  # what `measure` measures
    test: str  # the test that fails if somebody makes the mistake here
    switch: Callable[[StableDiffusion], Patches]
    measure: Callable[[StableDiffusion], float]
    made: str = ""  # where it was made, or found, in public: an address
    # What `effect` claims, as a test of two pictures of `prompt`: the right one, and the one with the bug.
    claim: Callable[[Image.Image, Image.Image], bool] | None = None
    prompt: str = "a smiling face"  # with this, and those below, the mistake shows best
    sampler: str = "ddim"
    steps: int = 25
    from_picture: bool = False  # True if the mistake shows in image-to-image only

    def said(self, right: float, wrong: float) -> str:
        """Returns what was done, what comes of it, and how it is found, in sentences."""
        where = f" Made in public: {self.made}." if self.made else ""
        return (
            f"{self.name}: {self.title}. {self.effect} What gives it away: {self.number}, {right:.3g} when "
            f"right and {wrong:.3g} with the bug. Caught by {self.test}.{where}"
        )

    @contextmanager
    def switched_on(self, pipe: StableDiffusion) -> Iterator[None]:
        """Makes the mistake everywhere in this process until the block ends; use one bug at a time."""
        with ExitStack() as stack:
            stack.enter_context(graphs.recorder.eager())  # what was recorded has no mistake
            for change in self.switch(pipe):
                stack.enter_context(change)
            yield

    def draw(
        self,
        pipe: StableDiffusion,
        prompt: str | None = None,
        seed: int = 0,
        known: dict[str, Image.Image] | None = None,
        **settings: Any,
    ) -> tuple[Image.Image, Image.Image]:
        """The picture without the bug, and with it. prompt: None for that with which the bug shows best.

        known: the right pictures of other bugs. One that this bug shares is taken from there, and a new one
        is added.
        """
        prompt = self.prompt if prompt is None else prompt
        settings = {"sampler": self.sampler, "steps": self.steps, "cfg": 4.0, **settings}
        known, asked = {} if known is None else known, repr((prompt, seed, sorted(settings.items())))
        if asked not in known:
            known[asked] = pipe.generate(prompt, seed=seed, progress=False, **settings)
        right = known[asked]
        if self.from_picture:
            settings |= {"init_image": right, "strength": 0.3}
            right = pipe.generate(prompt, seed=seed, progress=False, **settings)
        with self.switched_on(pipe):
            wrong = pipe.generate(prompt, seed=seed, progress=False, **settings)
        return right, wrong


BUGS: dict[str, Bug] = {}


def mistake(
    title: str,
    effect: str,
    number: str,
    measure: Callable[[StableDiffusion], float],
    test: str,
    into: dict[str, Bug] = BUGS,
    **more: Any,
) -> Any:
    """Makes a `Bug` of the function below it, whose name it has."""

    def register(switch: Callable[[StableDiffusion], Patches]) -> Callable[[StableDiffusion], Patches]:
        name = switch.__name__.replace("_", "-")
        into[name] = Bug(name, title, effect, number, test, switch, measure, **more)
        return switch

    return register


def bugs_of(pipe: StableDiffusion) -> dict[str, Bug]:
    """Returns the bugs that a model of this family can have."""
    if isinstance(pipe, StableDiffusion3):
        from .bugs_sd3 import SD3_BUGS

        return SD3_BUGS
    if isinstance(pipe, StableDiffusionXL):
        from .bugs_sdxl import SDXL_BUGS

        return SDXL_BUGS
    return BUGS


def with_methods(network: nn.Module, kind: type[nn.Module], **methods: Callable[..., Any]) -> Patches:
    """Gives the modules of a kind other methods."""
    for module in network.modules():
        if isinstance(module, kind):
            yield swapped(module, type(kind.__name__, (type(module),), methods))


def gallery(
    pipe: StableDiffusion, request: Request, names: Sequence[str] | None = None, across: int = 2
) -> Exhibit:
    """Each named bug's picture beside the right one, their difference, and the number that gives it away.

    names: None for all bugs.
    """
    bugs = bugs_of(pipe)
    names = names or list(bugs)
    for name in names:
        if name not in bugs:
            raise ValueError(f"there is no bug {name!r}; there are {', '.join(bugs)}")
    request = request.for_model(pipe.config)
    drawn, captions, numbers, found = [], [], {}, {}
    known: dict[str, Image.Image] = {}
    for name in Bar(names, unit="bug", leave=False):
        bug = bugs[name]
        prompt, seed = request.prompts[0], request.seeds[0]
        pair = bug.draw(pipe, prompt, seed, known, cfg=request.cfg, steps=request.steps)
        drawn.append((*pair, difference(*pair)))
        right = bug.measure(pipe)
        with bug.switched_on(pipe):
            wrong = bug.measure(pipe)
        found[name] = right, wrong
        what = textwrap.fill(bug.number, 34 if len(names) == 1 else 20)
        captions.append((f"{name}\nright: {right:.3g}", f"\nwith the bug: {wrong:.3g}", what))
        numbers[name] = {"title": bug.title, "number": bug.number, "right": right, "wrong": wrong}

    def rows(cells: list[tuple]) -> list[list]:
        return [[x for bug in cells[i : i + across] for x in bug] for i in range(0, len(cells), across)]

    title = f"Famous bugs, on “{plain(request.prompts[0])}”"
    figure = picture_grid(
        rows(drawn),
        title,
        "each three: as it should be, with the mistake, and eight times the difference",
        columns=["right", "with the bug", "difference × 8"] * min(across, len(names)),
        captions=rows(captions),
    )
    alt = f"{len(names)} times {request.prompts[0]}: right, drawn with a known mistake, and the difference"
    few = [bugs[name].said(*found[name]) for name in names] if len(names) <= 3 else []
    return Exhibit(figure, title, alt, " ".join([*few, GUIDE["bugs"]]), numbers)


# ---- what may be seen in two pictures -------------------------------------------------------------------


def blotches(picture: Image.Image) -> float:
    """Returns how uneven flat areas are, in levels: the median over squares of 4 × 4 pixels of how far a
    square's mean is from that of its four neighbours.
    """
    x = np.asarray(
        picture.resize((picture.width // 4, picture.height // 4), Image.Resampling.BOX), dtype=float
    )
    around = (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]) / 4
    return float(np.median(np.abs(x[1:-1, 1:-1] - around)))


def chroma(picture: Image.Image) -> float:
    """Returns how colourful a picture is, in levels: the mean of a pixel's largest channel less its least."""
    x = np.asarray(picture, dtype=float)
    return float((x.max(-1) - x.min(-1)).mean())


def _level(picture: Image.Image) -> float:
    return float(np.asarray(picture).mean())


def _border(picture: Image.Image) -> float:
    """Returns the mean level of the eight rows at the top and the eight columns at the left."""
    x = np.asarray(picture, dtype=float)
    return float((x[:8].mean() + x[:, :8].mean()) / 2)


# ---- what is measured -------------------------------------------------------------------------------------


def _latents(pipe: StableDiffusion, seed: int = 0) -> Tensor:
    shape = (1, pipe.config.vae.latent_channels, 16, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _decoded_mean(pipe: StableDiffusion) -> float:
    """Returns the mean level, 0 … 255, of one decoded picture."""
    return to_tensor(pipe.decode(_latents(pipe))[0]).add(1).mul(127.5).mean().item()


def _decoder_input_std(pipe: StableDiffusion) -> float:
    seen: dict[str, float] = {}
    layer = pipe.models["decoder"].get_submodule("post_quant")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(std=args[0].float().std().item()))
    try:
        pipe.decode(_latents(pipe))
    finally:
        handle.remove()
    return seen["std"]


def _round_trip_psnr(pipe: StableDiffusion) -> float:
    """Returns the PSNR in dB of a picture with edges at every phase of the pixel grid."""
    ramp = torch.arange(128.0)
    x = torch.stack([((ramp[:, None] + k * ramp) % 24 < 12).float() * 1.6 - 0.8 for k in (1, 2, 3)])[None]
    y = to_tensor(pipe.decode(pipe.encode_image(x))[0])
    return -10 * math.log10(((x - y) ** 2).mean().item() / 4)


def _last_step(pipe: StableDiffusion) -> float:
    sampler = samplers.DDIMSampler(None)
    sampler.set_inference_timesteps(25)
    return float(sampler.timesteps[-1])


def _left_noise(pipe: StableDiffusion) -> float:
    """Returns the distance to the clean latents after 25 steps of DDIM with a perfect network."""
    x0 = _latents(pipe)
    sampler = samplers.DDIMSampler(None)
    sampler.set_inference_timesteps(25)
    x = sampler.add_noise(x0, int(sampler.timesteps[0]), _latents(pipe, 1))
    for t in sampler.timesteps:
        alpha_bar = sampler.alphas_cumprod[t]
        x = sampler.step(t, x, ((x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()).float())
    return (x - x0).std().item()


def _first_cosine(pipe: StableDiffusion) -> float:
    return diffusion.sinusoids(torch.tensor([0.0]), 32)[0, 0].item()


def _towards_the_words(pipe: StableDiffusion) -> float:
    """Returns how far a guided step goes in the direction of the prompt: s if the code is right."""

    def eps(prompt: str, scale: float) -> Tensor:
        steps = pipe.denoise(prompt, seed=0, steps=4, cfg=scale, sampler="ddim")
        return next(steps).eps

    nothing = eps("", 1)
    words, guided = eps("a red apple", 1) - nothing, eps("a red apple", 4) - nothing
    return ((guided * words).sum() / words.pow(2).sum()).item()


def _first_word_depends_on_the_last(pipe: StableDiffusion) -> float:
    """Returns how much the first token's vector changes when a later word changes."""
    one, other = pipe.encode_text(["a red apple", "a red castle"]).float()
    return (one[1] - other[1]).abs().max().item()


def _activation_at_minus_one(pipe: StableDiffusion) -> float:
    layer = next(m for m in pipe.models["clip"].modules() if isinstance(m, clip.CLIPLayer))
    return layer.activation(torch.tensor(-1.0)).item()


def _middle_alpha_bar(pipe: StableDiffusion) -> float:
    return ddpm.DDPMSampler(None).alphas_cumprod[500].item()


def _largest_sigma(pipe: StableDiffusion) -> float:
    """Returns σ of the latents when the weights of the encoder's last layer are 1,000 times too large."""
    with _times(pipe.models["encoder"].quant.weight, 1e3):  # type: ignore[arg-type, union-attr]
        moments = pipe.models["encoder"].moments(to_tensor(pipe.decode(_latents(pipe))[0]).to(pipe.dtype))  # type: ignore[operator]
    return moments[1].float().mul(0.5).exp().max().item()


@contextmanager
def _times(parameter: Tensor, factor: float) -> Iterator[None]:
    before = parameter.data
    parameter.data = before * factor
    try:
        yield
    finally:
        parameter.data = before


def _darker_by(pipe: StableDiffusion) -> float:
    """Returns the number of levels by which an even grey ramp comes out too dark."""
    levels = torch.linspace(0, 255, 5000)
    picture = pipeline.to_picture((levels / 127.5 - 1).expand(3, 1, -1))
    return (levels.mean() - to_tensor(picture).add(1).mul(127.5).mean()).item() if pipe else math.nan


def _noise_correlation(pipe: StableDiffusion) -> float:
    """Returns the correlation between the fresh noise of two successive steps."""
    sampler = samplers.EulerAncestralSampler(torch.Generator().manual_seed(0))
    x = _latents(pipe)
    return torch.corrcoef(torch.stack([sampler._noise(x).flatten(), sampler._noise(x).flatten()]))[
        0, 1
    ].item()


def _velocity_read_as_noise(pipe: StableDiffusion) -> float:
    """Returns the error of x₀ at t = 500 when the network is perfect."""
    x0, noise, t = _latents(pipe), _latents(pipe, 1), torch.tensor([500])
    sampler = samplers.DDIMSampler(None, prediction_type=pipe.config.schedule.prediction_type)
    output = (
        sampler.velocity(x0, t, noise) if pipe.config.schedule.prediction_type == "v_prediction" else noise
    )
    return (sampler.predict(500, sampler.add_noise(x0, t, noise), output)[0] - x0).std().item()


def _noise_after_the_last_step(pipe: StableDiffusion) -> float:
    """Returns the spread between the last steps of two runs from the same latents."""

    def last(seed: int) -> Tensor:
        sampler = ddpm.DDPMSampler(torch.Generator().manual_seed(seed))
        sampler.set_inference_timesteps(25)
        return sampler.step(sampler.timesteps[-1], _latents(pipe), _latents(pipe, 1))

    return (last(0) - last(1)).std().item()


def _largest_activation(pipe: StableDiffusion) -> float:
    """Returns the decoder's largest activation; half precision ends at 65504."""
    seen = [0.0]
    handles = [
        m.register_forward_hook(
            lambda *a: seen.append(a[2].float().abs().nan_to_num(math.inf, math.inf).max().item())
        )
        for m in pipe.models["decoder"].modules()
        if isinstance(m, nn.Conv2d)
    ]
    try:
        pipe.decode(_latents(pipe))
    finally:
        for handle in handles:
            handle.remove()
    return max(seen)


def _first_scale(pipe: StableDiffusion) -> float:
    """Returns the standard deviation of an Euler sampler's first latents over the σ of its first step."""
    sampler = samplers.EulerSampler(None)
    sampler.set_inference_timesteps(25)
    return sampler.init_noise_sigma / sampler.sigmas[0]


def _group_norm_gain(pipe: StableDiffusion) -> float:
    """Returns the size of a nearly flat input (σ = 10⁻³) after the decoder's last norm: without ε, 1."""
    norm = pipe.models["decoder"].norm
    assert isinstance(norm, nn.GroupNorm)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, norm.num_channels, 16, 16, generator=generator) * 1e-3
    return F.group_norm(x, norm.num_groups, eps=norm.eps).std().item()


# ---- the bugs ---------------------------------------------------------------------------------------------


@mistake(
    "GroupNorm's ε in the VAE is PyTorch's 10⁻⁵ and not 10⁻⁶",
    "Nobody sees it: the colours of flat areas move by less than a level. Every comparison with a "
    "reference shows it, and most tutorials have it.",
    "size of a nearly flat input after the norm",
    _group_norm_gain,
    "tests/parity/test_networks.py::test_group_norm_has_the_eps_it_was_trained_with",
    made="https://github.com/ml-explore/mlx-examples/issues/1434",
    claim=lambda right, wrong: distance(right, wrong) < 2,
)
def wrong_eps(pipe: StableDiffusion) -> Patches:
    for network in ("encoder", "decoder"):
        for module in pipe.models[network].modules():
            if isinstance(module, nn.GroupNorm):
                yield patch.object(module, "eps", 1e-5)


@mistake(
    "The encoder pads all four sides before halving",
    "Everything moves by half a pixel at each level. Image-to-image moves its picture, changes it, and "
    "draws a bar along its upper and left edge.",
    "PSNR of the VAE's round trip on fine, hard stripes, which no VAE keeps well, dB",
    _round_trip_psnr,
    "tests/parity/test_networks.py::test_encoder_pads_right_and_bottom_only",
    from_picture=True,
    made="https://github.com/kjsman/stable-diffusion-pytorch/issues/8",
    claim=lambda right, wrong: _border(wrong) < _border(right) - 15,
    prompt="a dog next to a tree",
    steps=8,
)
def symmetric_padding(pipe: StableDiffusion) -> Patches:
    def forward(self: encoder.Downsample, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (1, 1, 1, 1)))

    yield from with_methods(pipe.models["encoder"], encoder.Downsample, forward=forward)


@mistake(
    "The latents are divided by the scale factor of another model (0.18215)",
    "The numbers have the wrong size, so colours are burnt and contrast is too high; or pale, if a factor"
    " below 1 is forgotten.",
    "standard deviation of the decoder's input",
    _decoder_input_std,
    "tests/parity/test_sd3_vae.py::test_vae_without_quant_convolutions_equals_the_reference",
    made="https://github.com/huggingface/diffusers/issues/6923",
    claim=lambda right, wrong: np.std(wrong) > 1.05 * np.std(right) and distance(right, wrong) > 20,
)
def wrong_scale(pipe: StableDiffusion) -> Patches:
    right = type(pipe.models["decoder"]).forward

    def forward(self: decoder.Decoder, latents: Tensor) -> Tensor:
        return right(self, latents * self.config.scale_factor / 0.18215)

    yield from with_methods(pipe.models["decoder"], decoder.Decoder, forward=forward)


@mistake(
    "Timesteps are counted from 0: the offset of 1 is forgotten",
    "All noise levels are a little too low. The picture differs from every reference, by so little that "
    "nobody sees it.",
    "the last timestep",
    _last_step,
    "tests/model/test_samplers.py::test_leading_timesteps_have_stable_diffusions_offset",
    made="https://github.com/hkproj/pytorch-stable-diffusion/blob/main/sd/ddpm.py",
    claim=lambda right, wrong: 0 < distance(right, wrong) < 5,
)
def no_offset(pipe: StableDiffusion) -> Patches:
    def leading(n: int, total: int) -> Tensor:
        return torch.arange(n).flip(0) * (total // n)

    yield patch.object(ddpm, "leading", leading)


@mistake(
    "DDIM takes ᾱ of the timestep before, whatever the stride",
    "Only right with 1,000 steps. With 25, each step removes a fortieth of the noise that it should "
    "remove, and nearly all of it is left.",
    "noise left by a perfect network",
    _left_noise,
    "tests/parity/test_samplers.py::test_equals_diffusers_in_float64",
    made="https://github.com/lucidrains/denoising-diffusion-pytorch/issues/81",
    claim=lambda right, wrong: blotches(wrong) > 4 * blotches(right),
)
def ddim_without_stride(pipe: StableDiffusion) -> Patches:
    def alpha_bar_after(self: samplers.DDIMSampler, i: int) -> float:
        return self.alphas_cumprod[max(0, int(self.timesteps[i]) - 1)].item()

    yield patch.object(samplers.DDIMSampler, "_alpha_bar_after", alpha_bar_after)


@mistake(
    "Sine and cosine are swapped in the time embedding",
    "The network is told a time that does not exist. The mini sees what is to be drawn all the same, but "
    "leaves noise in it.",
    "first component of the embedding of t = 0",
    _first_cosine,
    "tests/parity/test_networks.py::test_time_is_cosines_then_sines",
    made="https://github.com/flashinfer-ai/flashinfer/pull/3819",
    claim=lambda right, wrong: blotches(wrong) > 2 * blotches(right),
)
def sines_first(pipe: StableDiffusion) -> Patches:
    right = diffusion.sinusoids

    def sinusoids(t: Tensor, width: int) -> Tensor:
        return right(t, width).roll(width // 2, dims=-1)

    yield patch.object(diffusion, "sinusoids", sinusoids)


@mistake(
    "The halves of the guidance batch are swapped",
    "The picture runs away from the prompt, to anything except what was asked for.",
    "how far a step goes towards the prompt, at scale 4",
    _towards_the_words,
    "tests/model/test_pipeline.py::test_guidance_goes_from_the_negative_prompt_to_the_prompt_and_beyond",
    made="https://github.com/Nerogar/OneTrainer/issues/775",
    claim=lambda right, wrong: distance(right, wrong) > 60,
)
def guidance_swapped(pipe: StableDiffusion) -> Patches:
    right = type(pipe.models["diffusion"]).forward

    def forward(self: diffusion.UNet, latents: Tensor, context: Tensor, t: Tensor, **more: Any) -> Tensor:
        output = right(self, latents, context, t, **more)
        return output.roll(len(output) // 2, dims=0) if len(output) % 2 == 0 else output

    yield from with_methods(pipe.models["diffusion"], diffusion.UNet, forward=forward)


@mistake(
    "The text encoder has the exact GELU and not CLIP's quick one",
    "Each word's vector is a little wrong. With the mini's four layers that is too little to be seen; it "
    "adds up in deeper encoders.",
    "the activation at −1",
    _activation_at_minus_one,
    "tests/parity/test_clip.py::test_output_is_the_reference_s",
    made="https://github.com/mindspore-lab/mindone/pull/225",
    claim=lambda right, wrong: 0 < distance(right, wrong) < 5,
    prompt="a small purple cat on the left and a green tree on the right",
)
def wrong_gelu(pipe: StableDiffusion) -> Patches:
    for module in pipe.models["clip"].modules():
        if isinstance(module, clip.CLIPLayer):
            yield patch.object(module, "activation", F.gelu)


@mistake(
    "The text encoder's causal mask is missing",
    "Each word's vector is mixed with those of the words after it, and with those of the padding. The "
    "more words, the more goes wrong.",
    "change of the first word's vector when the last word changes",
    _first_word_depends_on_the_last,
    "tests/model/test_clip.py::test_no_token_sees_a_later_one",
    made="https://github.com/sgl-project/sglang/pull/14364",
    claim=lambda right, wrong: distance(right, wrong) > 40,
    prompt="a purple cat next to a green tree",
)
def no_causal_mask(pipe: StableDiffusion) -> Patches:
    right = attention.SelfAttention.forward

    def forward(self: attention.SelfAttention, x: Tensor, causal: bool = False) -> Tensor:
        return right(self, x, causal=False)

    yield from with_methods(pipe.models["clip"], attention.SelfAttention, forward=forward)


@mistake(
    "The betas grow in a straight line, but in Stable Diffusion their square roots do",
    "The sampler assumes more noise than there is in the middle of the way. With few steps colours come "
    "out paler; many steps hide it.",
    "ᾱ at t = 500",
    _middle_alpha_bar,
    "tests/model/test_samplers.py::test_schedule_is_stable_diffusions",
    made="https://github.com/antgroup/echomimic/pull/127",
    claim=lambda right, wrong: chroma(wrong) < 0.95 * chroma(right) and distance(right, wrong) > 8,
    prompt="a red apple on a blue background",
    sampler="euler",
    steps=8,
)
def linear_betas(pipe: StableDiffusion) -> Patches:
    right = ddpm.Sampler.__init__

    def init(self: ddpm.Sampler, *args: Any, **settings: Any) -> None:
        right(self, *args, **{**settings, "beta_schedule": "linear"})

    yield patch.object(ddpm.Sampler, "__init__", init)


@mistake(
    "The log-variance is not clamped",
    "Nothing happens until the first odd picture: then exp() overflows, and the result is NaN. Pictures "
    "drawn from words never meet it.",
    "σ of the latents when the encoder's last layer is wrong",
    _largest_sigma,
    "tests/parity/test_networks.py::test_log_variance_stays_where_exp_is_finite",
    made="https://github.com/vanderschaarlab/synthcity/issues/331",
    claim=lambda right, wrong: distance(right, wrong) == 0,
)
def unclamped_variance(pipe: StableDiffusion) -> Patches:
    right = encoder.Encoder.moments

    def moments(self: encoder.Encoder, image: Tensor) -> tuple[Tensor, Tensor]:
        with patch.object(torch.Tensor, "clamp", lambda x, *limits: x):
            return right(self, image)

    yield from with_methods(pipe.models["encoder"], encoder.Encoder, moments=moments)


@mistake(
    "Pixels are cut off to whole numbers, not rounded",
    "Everything is half a level darker. Nobody sees that, but every comparison shows it.",
    "levels by which a grey ramp is darker",
    _darker_by,
    "tests/model/test_pipeline.py::test_pixels_are_rounded_to_the_nearest_level",
    made="https://github.com/pytorch/vision/issues/8141",
    claim=lambda right, wrong: 0.1 < _level(right) - _level(wrong) < 1,
)
def truncated_pixels(pipe: StableDiffusion) -> Patches:
    def to_picture(pixels: Tensor) -> Image.Image:
        levels = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    yield patch.object(pipeline, "to_picture", to_picture)


@mistake(
    "The same noise is added in every step",
    "A generator is seeded inside the loop. The noise's own pattern adds up and stays in the picture.",
    "correlation of the noise of two steps",
    _noise_correlation,
    "tests/model/test_samplers.py::test_each_step_draws_noise_of_its_own",
    sampler="euler_a",
    made="https://github.com/Kosinkadink/ComfyUI-AnimateDiff-Evolved/issues/532",
    claim=lambda right, wrong: blotches(wrong) > 2 * blotches(right),
    prompt="a dog next to a tree",
)
def noise_reused(pipe: StableDiffusion) -> Patches:
    def noise(self: ddpm.Sampler, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)

    yield patch.object(ddpm.Sampler, "_noise", noise)


@mistake(
    "A network that predicts the velocity is read as predicting the noise",
    "Steps of the right size in the wrong direction: the colours are burnt, and noise is left all over "
    "the picture.",
    "error of x₀ with a perfect network",
    _velocity_read_as_noise,
    "tests/model/test_samplers.py::test_a_network_that_knows_the_picture_leads_to_it",
    made="https://github.com/invoke-ai/InvokeAI/issues/7495",
    claim=lambda right, wrong: blotches(wrong) > 2 * blotches(right) and distance(right, wrong) > 30,
)
def wrong_prediction_type(pipe: StableDiffusion) -> Patches:
    right = ddpm.Sampler.__init__
    other = "epsilon" if pipe.config.schedule.prediction_type == "v_prediction" else "v_prediction"

    def init(self: ddpm.Sampler, *args: Any, **settings: Any) -> None:
        right(self, *args, **{**settings, "prediction_type": other})

    yield patch.object(ddpm.Sampler, "__init__", init)


@mistake(
    "Noise is added after the last step too",
    "The noise of one more step lies over the finished picture: flat areas get blotches. In pixels it "
    "would be fine grain; the decoder turns that of latents into blots of eight pixels.",
    "spread of the last step's result",
    _noise_after_the_last_step,
    "tests/parity/test_samplers.py::test_equals_diffusers_in_float64",
    sampler="ddpm",
    made="https://github.com/finegrain-ai/refiners/pull/192",
    claim=lambda right, wrong: blotches(wrong) > 1.2 * blotches(right),
)
def noise_at_the_end(pipe: StableDiffusion) -> Patches:
    right = ddpm.DDPMSampler._step

    def step(self: ddpm.DDPMSampler, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        after = right(self, i, x, model_output)
        last = i == len(self.timesteps) - 1
        return (
            after + math.sqrt(self.betas[self.timesteps[i]].item() * 40) * self._noise(x) if last else after
        )

    yield patch.object(ddpm.DDPMSampler, "_step", step)


@mistake(
    "An Euler sampler starts from noise of variance 1",
    "Its latents are x₀ + σε with σ of 14 or more; noise of size 1 looks like an almost finished, empty "
    "picture. The network, which is told the time, repairs most of that, and draws other, coarser shapes.",
    "size of the first latents, in σ",
    _first_scale,
    "tests/parity/test_samplers.py::test_equals_diffusers",
    sampler="euler",
    made="https://github.com/huggingface/diffusers/pull/891",
    claim=lambda right, wrong: distance(right, wrong) > 10,
    prompt="a dog next to a tree",
)
def unscaled_start(pipe: StableDiffusion) -> Patches:
    yield patch.object(samplers.EulerSampler, "init_noise_sigma", 1.0)


@mistake(
    "The VAE is run in half precision although its activations are too large for that",
    "The picture is black. Here one layer's weights are 10⁶ times larger, which the norm after it undoes: in "
    "float32 the picture is unchanged. The published VAE of SDXL has such layers.",
    "largest activation in the decoder; float16 ends at 65504",
    _largest_activation,
    "tests/model/test_pipeline.py::test_a_vae_that_overflows_decodes_again_in_float32",
    made="https://github.com/AUTOMATIC1111/stable-diffusion-webui/issues/12019",
    claim=lambda right, wrong: _level(wrong) == 0 < _level(right),
)
def overflow(pipe: StableDiffusion) -> Patches:
    decoder = pipe.models["decoder"]
    block = next(m for m in decoder.modules() if isinstance(m, encoder.ResidualBlock))
    for parameter in (block.conv_1.weight, block.conv_1.bias):
        assert parameter is not None
        yield _times(parameter, 1e6)

    def decode(latents: Tensor) -> list[Image.Image]:  # without our code's second try in float32
        half = copy.deepcopy(decoder).half()
        pixels = [half(z.half()) for z in latents.split(1)]
        return [pipeline.to_picture(p[0].float().nan_to_num(-1.0)) for p in pixels]

    yield patch.object(pipe, "decode", decode)
