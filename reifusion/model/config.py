"""Every size and constant of a model, in five frozen dataclasses and nothing else.

A network is built from its dataclass alone, so SD 1.x and the mini are the same code
at two sizes. Defaults are Stable Diffusion 1.5; `MINI` is the model that ships here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CLIPConfig:
    """The text encoder (Radford et al. 2021). SD 1.x: OpenAI's CLIP ViT-L/14."""

    vocab_size: int = 49408
    context_length: int = 77  # tokens, start and end included
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"  # OpenAI's CLIP; OpenCLIP (SD 2.x) has "gelu"


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder (Rombach et al. 2022, §3.1)."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (128, 256, 512, 512)  # one per resolution, full size first
    layers: int = 2  # residual blocks per resolution (the decoder has one more)
    groups: int = 32  # of every GroupNorm
    scale_factor: float = 0.18215  # 1 / std of the latents, so that the U-Net sees unit variance

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser (Ronneberger et al. 2015; Rombach et al. 2022, §3.2)."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one per resolution
    attention: tuple[bool, ...] = (True, True, True, False)  # transformer blocks at that resolution?
    layers: int = 2  # residual blocks per resolution on the way down (one more on the way up)
    heads: int = 8  # attention heads, the same number at every resolution
    head_width: int | None = None  # SD 2.x fixes the heads' width (64) instead of their number
    context_width: int = 768  # of the text encoder
    groups: int = 32
    linear_projection: bool = False  # SD 2.x: linear layers around the transformer, not 1×1 convolutions
    guidance_width: int | None = None  # LCMs: of the waves that tell them how strong guidance is

    def heads_at(self, channels: int) -> int:
        """The number of attention heads in a transformer block of that width."""
        return self.heads if self.head_width is None else channels // self.head_width


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process that the U-Net was trained to undo (Ho et al. 2020, §2).

    For "flow", that is the straight line from picture to noise (Liu et al. 2022), and only the number of
    steps counts: what the U-Net sees as the time is σ in [0, 1], times that number.
    """

    num_training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction_type: str = "epsilon"  # what the U-Net's output means; or "v_prediction"; "flow", see above
    zero_terminal_snr: bool = False  # nothing but noise at the last step (Lin et al. 2023), for v_prediction
    timestep_spacing: str | None = None  # the samplers' own, or "trailing": beginning at the last step
    original_inference_steps: int = 50  # LCMs: how many timesteps they were distilled on


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model."""

    name: str = "sd-1.5"
    size: int = 512  # the side, in pixels, of the pictures it was trained on
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # What its pictures are best drawn with. The command line and the studio begin with these.
    sampler_name: str = "dpmpp_2m_karras"
    n_inference_steps: int = 25
    cfg_scale: float = 7.5

    @property
    def best(self) -> dict[str, Any]:
        """The last three by the names of `reifusion generate`; one sampler fits a flow, and an LCM."""
        if self.unet.guidance_width is not None:
            return {"sampler": "lcm", "steps": 4, "cfg": 8.0}  # as Luo et al. 2023 draw with their LCMs
        flow = self.schedule.prediction_type == "flow"
        sampler = "flow" if flow else self.sampler_name
        return {"sampler": sampler, "steps": self.n_inference_steps, "cfg": self.cfg_scale}


SD15 = ModelConfig()

# The model that ships here: the same networks, small enough to train on a laptop.
MINI = ModelConfig(
    name="mini",
    size=128,
    clip=CLIPConfig(vocab_size=2048, context_length=32, width=192, layers=4, heads=6),
    vae=VAEConfig(channels=(32, 64, 128, 128), layers=1, groups=8, scale_factor=1.0),
    unet=UNetConfig(
        channels=(128, 192, 256),
        attention=(True, True, True),
        layers=1,
        head_width=64,
        context_width=192,
        linear_projection=True,
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sampler_name="euler_a",
    cfg_scale=4.0,
)
