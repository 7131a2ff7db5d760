"""Pictures of the latents that the U-Net works on, and of the VAE's way there and back."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..model.encoder import scale_latents
from ..model.pictures import fit, to_tensor
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .figures import INK, PAPER, Exhibit, heat_picture, picture_grid, signed_picture, typeface
from .guide import GUIDE, one_line
from .trajectory import describe


def latents(pipe: StableDiffusion, request: Request) -> Exhibit:
    """The channels of a picture's latents, and what is left of the picture when one is evened out."""
    request = request.for_model(pipe.config)
    *_, last = pipe.denoise(request)
    z = last.latents  # (1, C, h, w)
    picture = pipe.decode(z)[0]
    without = []
    for channel in range(z.shape[1]):
        even = z.clone()
        even[:, channel] = z[:, channel].mean()
        without += pipe.decode(even)
    values = z[0].float().cpu()
    most = values.abs().max().item()
    channels = [
        signed_picture(channel, most).resize(picture.size, Image.Resampling.NEAREST) for channel in values
    ]
    spread = [(channel.mean().item(), channel.std().item()) for channel in values]
    figure = picture_grid(
        [[picture, *channels], [None, *without]],
        "The picture as the U-Net knows it",
        f"{describe(request)} · latents {'×'.join(map(str, z.shape[1:]))}, full colour at ±{most:.1f}",
        columns=["decoded", *(f"channel {k}" for k in range(len(channels)))],
        rows=["latents", "without\nthe channel"],
        captions=[["", *(f"mean {mean:.2f}, std {std:.2f}" for mean, std in spread)], []],
    )
    alt = one_line(f"""
        The picture of “{request.prompts[0]}” beside its {len(channels)} latent channels in blue and red, and
        below each channel the picture that is decoded without it.""")
    title = "The picture as the U-Net knows it"
    return Exhibit(figure, title, alt, GUIDE["latents"], {"mean_std": spread, "most": most})


def vae(pipe: StableDiffusion, request: Request, picture: Image.Image | None = None) -> Exhibit:
    """Shows the round trip of a picture, or of a test card; nothing else is asked of the request."""
    return round_trip(pipe, picture)


def round_trip(pipe: StableDiffusion, picture: Image.Image | None = None) -> Exhibit:
    """Shows a picture that was encoded and decoded, with the error and the latents; None: a test card."""
    size = pipe.config.size
    picture = test_card(size) if picture is None else fit(picture.convert("RGB"), size, size)
    encoder = pipe.models["encoder"].to(pipe.device)
    with torch.inference_mode():
        pixels = to_tensor(picture).to(pipe.device, next(encoder.parameters()).dtype)
        mean, log_variance = encoder.moments(pixels)  # type: ignore[operator]
        z = scale_latents(mean, pipe.config.vae).float()
    back = pipe.decode(z)[0]
    error = np.asarray(back, dtype=float) - np.asarray(picture, dtype=float)
    mse = float(np.mean(error**2))
    # PSNR = 10 log₁₀(255² / MSE), in dB
    psnr = 10 * math.log10(255**2 / max(mse, 1e-12))
    factor, scale = pipe.config.vae.factor, pipe.config.vae.scale_factor
    sigma = scale * (log_variance[0].float() / 2).exp().mean(0).cpu()  # (h, w), scaled as latents are
    values = z[0].cpu()
    most = values.abs().max().item()

    def enlarged(small: Image.Image) -> Image.Image:
        return small.resize(picture.size, Image.Resampling.NEAREST)

    unsure = enlarged(heat_picture(sigma, 0, sigma.max().item()))
    figure = picture_grid(
        [
            [picture, back, heat_picture(4 * np.abs(error).max(-1) / 255), unsure],
            [enlarged(signed_picture(channel, most)) for channel in values],
        ],
        "There and back through the VAE",
        f"{pipe.config.name} · {psnr:.1f} dB",
        rows=["pixels", "latents"],
        captions=[
            ["picture", "decoded", "error, ×4", f"σ, {sigma.min():.3f} to {sigma.max():.3f}"],
            [f"channel {k}" for k in range(len(values))],
        ],
    )
    alt = one_line(f"""
        A picture, the same after encoding and decoding at {psnr:.1f} dB, the error, which follows edges and
        small letters, the latent channels, and how unsure the encoder is at each place.""")
    guide = (
        f"The encoder turns {3 * factor**2} numbers, {factor}×{factor} pixels in three colours, into"
        f" {len(values)}, and the decoder has to guess the rest. {GUIDE['vae']}"
    )
    return Exhibit(figure, "There and back through the VAE", alt, guide, {"psnr": psnr, "mse": mse})


def test_card(size: int) -> Image.Image:
    """Draws a bit of everything: a shade, flat areas, round edges, letters, stripes 8 to 1 pixels wide."""
    unit = size // 4  # drawn four times as large and then reduced, so that edges are smooth
    card = Image.new("RGB", (16 * unit, 16 * unit), PAPER)
    pen = ImageDraw.Draw(card)
    card.paste(Image.linear_gradient("L").rotate(90).resize((16 * unit, 2 * unit)), (0, 0))
    for k, colour in enumerate(("#d62828", "#f4a300", "#2a9d3c", "#2563c9")):
        pen.rectangle((4 * k * unit, 2 * unit, 4 * (k + 1) * unit, 4 * unit), fill=colour)
    pen.ellipse((unit, 5 * unit, 7 * unit, 11 * unit), fill="#ffd166", outline=INK, width=unit // 5)
    for x in (3, 5):
        pen.ellipse((x * unit - unit // 3, 7 * unit, x * unit + unit // 3, 7 * unit + unit), fill=INK)
    pen.arc((2 * unit, 6 * unit, 6 * unit, 10 * unit), 30, 150, fill=INK, width=unit // 4)
    card = card.resize((size, size), Image.Resampling.LANCZOS)
    pen, y = ImageDraw.Draw(card), size * 5 // 16
    for part in (9, 11, 14, 18):  # letters are 1/9 to 1/18 of the picture's height; the smallest are lost
        pen.text((size // 2, y), "reifusion", fill=INK, font=typeface(size // part))
        y += size // part + 2
    for k, width in enumerate((8, 4, 2, 1)):
        for x in range(k * unit, (k + 1) * unit, 2 * width):
            pen.rectangle((x, size * 3 // 4, x + width - 1, size), fill=INK)
    return card
