"""Every size and constant of a model, and the settings that suit it, in five frozen dataclasses.

A network is built from its dataclass alone, so SD 1.x and the mini are the same code at two sizes. Defaults
are Stable Diffusion 1.5; `MINI` is the model that ships here.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    shift: float = 0.0  # mean of the latents, where it is not neglected: SD 3 has 16 channels and 0.0609
    quant: bool = True  # 1×1 convolutions between the VAE's two halves, which SD 3 lacks

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser (Ronneberger et al. 2015; Rombach et al. 2022, §3.2)."""

    in_channels: int = 4
    out_channels: int = 4
    patch: int = 1  # p: a place of the U-Net is a patch of p×p latents, as in DiT (Peebles & Xie 2023, §3.2)
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one per resolution, full size first
    attention: tuple[int, ...] = (1, 1, 1, 0)  # transformer layers in each block of that resolution
    middle_attention: int = 1  # transformer layers in the middle
    middle: bool = True  # False: nothing between the way down and the way up, as in BK-SDM (Kim et al. 2023)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads at that resolution; the middle has the last
    layers: int = 2  # residual blocks per resolution on the way down (one more on the way up)
    context_width: int = 768  # of the text encoder
    groups: int = 32
    linear_projection: bool = False  # files hold linear layers around the transformer, not 1×1 convolutions
    guidance_width: int | None = None  # of the waves that tell a distilled U-Net (an LCM) its guidance scale


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process that the U-Net was trained to undo (Ho et al. 2020, §2).

    For "flow", that is the straight line from picture to noise (Liu et al. 2022), and only the number of
    steps counts: the U-Net is given the time as σ in [0, 1], times that number.
    """

    num_training_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    beta_schedule: str = "scaled_linear"  # linear in √β, Stable Diffusion's; "linear" or "squaredcos_cap_v2"
    trained_betas: tuple[float, ...] | None = None  # the βs of each training step, in place of a schedule
    prediction_type: str = "epsilon"  # what the U-Net predicts: "epsilon", "v_prediction" or "flow"
    zero_terminal_snr: bool = False  # all noise at the last step (Lin et al. 2023), for v_prediction
    timestep_spacing: str | None = None  # None: each sampler's own; "trailing": begins at the last timestep
    shift: float | None = None  # "flow": how much more time is spent near noise (SD 3); None: even steps
    original_inference_steps: int = 50  # LCMs: the number of timesteps that they were distilled on


@dataclass(frozen=True)
class ModelConfig:
    """A whole latent diffusion model."""

    name: str = "sd-1.5"
    size: int = 512  # the side, in pixels, of the pictures it was trained on
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    # Its pictures are best with these settings, so they are used where a request leaves them open.
    sampler: str = "dpmpp_2m_karras"
    steps: int = 25
    cfg: float = 7.5

    @property
    def multiple(self) -> int:
        """The sides of a picture are multiples of this, in pixels."""
        return self.vae.factor * self.unet.patch

    @property
    def edits(self) -> bool:
        """True if the U-Net sees a picture's latents beside the noise, and edits that picture by words."""
        return self.unet.in_channels == 2 * self.vae.latent_channels

    @property
    def inpaints(self) -> bool:
        """True if the U-Net sees a mask and the latents of what is kept beside the noise."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1


SD15 = ModelConfig()

SD21 = ModelConfig(
    name="sd-2.1",
    size=768,
    clip=CLIPConfig(width=1024, layers=23, heads=16, activation="gelu"),
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)

# The model that `reifusion train mini` makes: the same networks, small enough to train on a laptop.
MINI = ModelConfig(
    name="mini",
    size=256,
    clip=CLIPConfig(vocab_size=3072, context_length=32, width=192, layers=4, heads=6),
    vae=VAEConfig(channels=(32, 64, 128, 128), layers=1, groups=8, scale_factor=1.0),
    unet=UNetConfig(
        patch=2,
        channels=(128, 192, 256),
        attention=(1, 1, 1),
        heads=(2, 3, 4),
        layers=1,
        context_width=192,
        linear_projection=True,
    ),
    # Stable Diffusion's β ends at 0.012. Of 32 × 32 latents that leaves so much at the last timestep that
    # their background is read in them, and not in the words (book, chapter 2).
    schedule=ScheduleConfig(beta_end=0.02, prediction_type="v_prediction"),
    sampler="euler_a",
    cfg=4.0,
)
