"""In another program's manner: its noise, names, steps, sizes and rounding, one by one."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion import a1111, album
from reifusion.families import adapted
from reifusion.model.config import SD15
from reifusion.model.pipeline import StableDiffusion
from reifusion.settings import ABOUT, Settings, from_carried, parsed
from reifusion.steer import manners
from reifusion.steer.manners import MANNERS, Manner, left_out
from reifusion.steer.noises import NOISES, Philox
from tests import tiny_sd3, tiny_sdxl
from tests.tiny import SMALL, WORDS, networks

USUAL: dict[str, Any] = {"steps": 3, "cfg": 2.0, "seed": 5, "size": (32, 24)}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))


def drawn(pipe: StableDiffusion, settings: Settings, manner: Manner | None = None) -> Image.Image:
    return settings.draw(pipe, settings.request().for_model(pipe.config), manner=manner)


def steps_of(pipe: StableDiffusion, settings: Settings) -> list[Any]:
    seen: list[Any] = []
    settings.draw(pipe, settings.request().for_model(pipe.config), callback=seen.append)
    return seen


@pytest.mark.parametrize("sampler", ["euler_a", "ddim", "dpmpp_2m", "pndm"])
def test_the_manner_of_diffusers_is_ours(pipe, sampler):
    plain = Settings("a cat", sampler=sampler, **USUAL)
    assert drawn(pipe, replace(plain, manner="diffusers")).tobytes() == drawn(pipe, plain).tobytes()


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpm2"])
@pytest.mark.parametrize(("manner", "rule"), [("a1111", "σ"), ("comfyui", "√"), ("sdcpp", "σ")])
def test_a_picture_begins_with_the_programs_noise_as_loud_as_there(pipe, sampler, manner, rule):
    settings = Settings("a cat", sampler=sampler, manner=manner, **{**USUAL, "size": (64, 64)})
    begun = steps_of(pipe, settings)[0]
    alphas = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    sigma = ((1 - alphas[-1]) / alphas[-1]).sqrt().item()  # their schedule begins at the last timestep
    loud = sigma if rule == "σ" else (sigma**2 + 1) ** 0.5
    shape = (4, 32, 32)
    cpu = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    noise = cpu if manner == "comfyui" else Philox(5).randn(shape)
    torch.testing.assert_close(begun.x_t[0], loud * noise, rtol=1e-5, atol=1e-4)


def test_what_a_step_adds_is_the_programs_noise_too(pipe):
    settings = Settings("a cat", sampler="euler_a", manner="comfyui", **USUAL)
    first, second, *_ = steps_of(pipe, settings)
    # Ancestral: x' = Euler's step to σ_down, and σ_up times noise of a generator that begins anew
    a, b = first.sigma, second.sigma
    up = b * (a**2 - b**2) ** 0.5 / a
    x0, eps = first.predict(first.output)
    expected = x0 + (b**2 - up**2) ** 0.5 * eps + up * Philox(5).randn((4, 12, 16))
    torch.testing.assert_close(second.x_t, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("manner", "steps", "strength", "run"),
    [  # as their sources count them
        ("diffusers", 20, 0.5, 10), ("diffusers", 20, 0.75, 15),
        ("a1111", 20, 0.5, 11), ("a1111", 20, 0.75, 16), ("a1111", 20, 0.02, 1), ("a1111", 20, 1.0, 20),
        ("comfyui", 20, 0.5, 20), ("comfyui", 10, 1.0, 10), ("comfyui", 6, 0.3, 6),
        ("sdcpp", 20, 0.5, 11), ("sdcpp", 20, 1.0, 20),
    ],
)  # fmt: skip
def test_a_strength_leaves_as_many_steps_as_there(pipe, tmp_path, manner, steps, strength, run):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "photo.png")
    settings = Settings(
        "a cat", sampler="euler", manner=manner, init_image=str(tmp_path / "photo.png"), strength=strength,
        **{**USUAL, "steps": steps, "cfg": 1.0, "size": (64, 64)},
    )  # fmt: skip
    seen = steps_of(pipe, settings)
    assert len(seen) == run
    if manner == "comfyui" and strength == 0.5:  # the last 20 of 40: the whole way has 40 levels
        every = replace(settings, init_image=None, steps=40)
        assert [one.t for one in seen] == [one.t for one in steps_of(pipe, every)[20:]]


@pytest.mark.parametrize("by", ["lanczos", "latent"])
@pytest.mark.parametrize(("manner", "run"), [(None, 2), ("a1111", 4), ("comfyui", 4), ("diffusers", 2)])
def test_the_second_pass_of_a_larger_drawing_has_as_many_steps_as_there(pipe, by, manner, run):
    asked = Settings("a cat", seed=1, sampler="euler", steps=4, size=(32, 32), hires=2, hires_by=by)
    times: list[float] = []
    settings = replace(asked, hires_strength=0.5, manner=manner)
    settings.draw(pipe, settings.request(), callback=lambda step: times.append(float(step.t)))
    assert len(times) == 4 + run
    if run == 2:  # the last of the same steps
        assert times[4:] == times[2:4]
    else:  # the last four of eight, which begin near the middle
        assert abs(times[4] - 500) < 130 and times[5] not in times[:4]


def test_sizes_are_rounded_as_there():
    sizes = {"diffusers": (100, 71), "a1111": (96, 64), "comfyui": (96, 64), "sdcpp": (128, 128)}
    for manner, size in sizes.items():
        asked = Settings("a cat", manner=manner, size=(100, 71))
        assert asked.request().size == size


def test_pixels_are_cut_off_only_where_the_program_does(pipe):
    settings = Settings("a cat", sampler="ddim", **USUAL)
    found = {cut: np.asarray(drawn(pipe, settings, Manner(cut=cut))).astype(int) for cut in (False, True)}
    lost = found[False] - found[True]
    assert set(np.unique(lost)) == {0, 1} and 0.35 < lost.mean() < 0.65
    assert pipe.decode.__func__ is StableDiffusion.decode  # as it was
    assert [MANNERS[name].cut for name in ("diffusers", "a1111", "comfyui", "sdcpp")] == [
        False,
        True,
        True,
        False,
    ]


def test_schedules_are_the_programs_own_where_none_is_asked_for():
    def schedule(manner: str | None, sampler: str, asked: str | None = None) -> str | None:
        return Settings("a cat", manner=manner, sampler=sampler, schedule=asked).request().schedule

    assert schedule(None, "euler") is schedule("diffusers", "euler") is None
    assert (
        schedule("a1111", "euler") == schedule("comfyui", "dpmpp_2m") == schedule("sdcpp", "heun") == "normal"
    )
    assert schedule("a1111", "dpm2") == "karras" and schedule("a1111", "dpmpp_3m_sde") == "exponential"
    assert schedule("a1111", "dpmpp_2m_karras") == "karras" and schedule(None, "dpmpp_2m_karras") is None
    exact = Settings("a cat", manner="a1111", sampler="dpmpp_2m_karras").request()
    assert exact.sampler == "dpmpp_2m"  # whose timesteps are not rounded
    assert schedule("a1111", "ddim") is None and schedule("a1111", "euler", "beta") == "beta"


@pytest.mark.parametrize(
    ("manner", "sampler", "schedule", "ours"),
    [
        ("a1111", "DPM++ 2M", None, ("dpmpp_2m_karras", None)),
        ("a1111", "DPM++ 2M", "SGM Uniform", ("dpmpp_2m", "sgm_uniform")),
        ("a1111", "DPM++ SDE Karras", None, ("dpmpp_2s_sde", "karras")),
        ("a1111", "Euler a", None, ("euler_a", None)),
        ("comfyui", "dpmpp_sde", "karras", ("dpmpp_2s_sde", "karras")),
        ("comfyui", "dpmpp_2m_sde_gpu", "exponential", ("dpmpp_2m_sde", "exponential")),
        ("comfyui", "euler_ancestral", None, ("euler_a", None)),
        ("comfyui", "euler", None, ("euler", None)),
        ("sdcpp", "dpm++2m", "discrete", ("dpmpp_2m", "normal")),
        ("diffusers", "EulerAncestralDiscreteScheduler", None, ("euler_a", None)),
        ("diffusers", "DPMSolverMultistepScheduler", None, ("dpmpp_2m", None)),
        ("diffusers", "euler_a", "karras", ("euler_a", "karras")),  # ours
        ("a1111", "Euler", "Normal", ("euler", "normal")),
        ("a1111", "Euler", "Uniform", ("euler", "normal")),
        ("a1111", "Euler", "Beta", ("euler", "beta")),
        ("a1111", "Euler", "KL Optimal", ("euler", "kl_optimal")),
        ("a1111", "Euler", "Align Your Steps", ("euler", "align_your_steps")),
        ("sdcpp", "euler", "ays", ("euler", "align_your_steps")),
        ("comfyui", "nonesuch", None, ("nonesuch", None)),
    ],
)
def test_names_are_the_programs(manner, sampler, schedule, ours):
    given = {"manner": manner, "sampler": sampler} | ({"schedule": schedule} if schedule else {})
    found = parsed(given)
    assert (found["sampler"], found.get("schedule")) == ours
    del given["manner"]
    assert parsed(given, manner) | {"manner": manner} == found


def test_the_shell_line_of_any_sampler_in_any_manner_says_what_was_meant():
    from reifusion.model.samplers import SAMPLERS

    for manner in MANNERS:
        for sampler in SAMPLERS:
            settings = Settings("a cat", manner=manner, sampler=sampler)
            said = parsed({"manner": manner, "sampler": sampler})["sampler"]
            if said != sampler:  # one name means something else there; ours is refused by its name
                with pytest.raises(ValueError, match="is another sampler in ComfyUI"):
                    settings.request()
            elif not sampler.startswith("flow"):
                settings.request()


def test_a_brownian_path_that_is_not_repeated_is_said(pipe):
    with pytest.warns(UserWarning, match="Brownian path in stable-diffusion.cpp"):
        drawn(pipe, Settings("a cat", manner="sdcpp", sampler="dpmpp_2m_sde", **USUAL))


@pytest.mark.parametrize(("manner", "sampler"), [("a1111", "DPM2"), ("comfyui", "dpm_2"), ("sdcpp", "dpm2")])
def test_the_last_sigma_but_one_is_left_out_where_it_is_there(pipe, manner, sampler):
    n, given = 4, parsed({"manner": manner, "sampler": sampler, "schedule": "karras"})
    settings = Settings("a cat", steps=n, cfg=1.0, seed=9, size=(32, 24), **given)
    seen = steps_of(pipe, settings)
    sigmas = [seen[2 * k].sigma for k in range(n)]
    # Karras et al. 2022, Eq. 5, from the training's largest σ to its smallest
    ends, count = (14.6146 ** (1 / 7), 0.02917 ** (1 / 7)), n if manner == "sdcpp" else n + 1
    karras = [(ends[0] + k / (count - 1) * (ends[1] - ends[0])) ** 7 for k in range(count)]
    assert sigmas == pytest.approx(karras[:n], rel=1e-3)
    assert len(seen) == 2 * n - 1  # the last step, to 0, has one call


def test_noise_in_the_steps_may_be_that_of_another_seed(pipe, tmp_path):
    """A1111's ImageRNG: after the first noise, generators of seed + ENSD draw anew."""
    settings = Settings("a cat", steps=2, cfg=1.0, seed=9, size=(32, 24), sampler="euler_a", manner="a1111")
    plain, moved = (steps_of(pipe, replace(settings, ensd=delta)) for delta in (0, 31337))
    assert torch.equal(plain[0].x_t, moved[0].x_t)
    up = (plain[0].latents - moved[0].latents).flatten()
    first, later = Philox(9), Philox(9 + 31337)
    first.randn((4, 12, 16))
    other = (first.randn((4, 12, 16)) - later.randn((4, 12, 16))).flatten()
    factor = (up @ other) / (other @ other)
    assert torch.allclose(up, factor * other, atol=1e-5) and factor > 0.02
    text = "a cat\nSteps: 2, Sampler: Euler a, CFG scale: 1, Seed: 9, Size: 32x24, ENSD: 31337"
    assert a1111.read(text)[0].ensd == 31337
    assert "ENSD: 31337" in a1111.write(replace(settings, ensd=31337), "m", "0")


def test_prompts_are_read_as_there_unless_another_rule_is_asked_for():
    rules = {name: Settings(manner=name).there().emphasis for name in MANNERS}
    assert rules == {"diffusers": None, "a1111": "a1111", "comfyui": "comfyui", "sdcpp": "a1111"}
    assert Settings(manner="a1111", emphasis="plain", rng="cpu").there() == replace(
        MANNERS["a1111"], emphasis="plain", rng="cpu"
    )
    assert {one.rng for one in MANNERS.values()} <= NOISES.keys()
    assert {one.img2img for one in MANNERS.values()} <= manners.STEPS.keys()
    assert "manner" in ABOUT and {one.name for one in fields(Manner)} >= {"rng", "emphasis", "cut"}


def test_variations_count_up_and_the_seed_stays():
    settings = Settings("a cat", seed=7, variation=0.2, variation_seed=3)
    found = [settings.nth(7, k) for k in range(3)]
    assert [(one.seed, one.variation_seed) for one in found] == [(7, 3), (7, 4), (7, 5)]
    assert [Settings("a cat").nth(7, k).seed for k in range(3)] == [7, 8, 9]
    for one, name in (
        (Settings("a cat"), "seed"),
        (replace(settings, variation_seed=2**63 - 1), "variation_seed"),
    ):
        with pytest.raises(ValueError, match=f"the {name} of picture 2 must be between 0 and"):
            one.nth(2**63 - 1, 1)


@pytest.mark.parametrize("manner", [*MANNERS])
def test_networks_of_another_family_are_drawn_in_any_manner(manner):
    models = tiny_sd3.networks()
    pipe = adapted(StableDiffusion(tiny_sd3.TINY, tiny_sd3.tokenizers(), models))
    # Brackets are text for a model with several text encoders, and all is noise where rectified flow begins.
    settings = Settings("a (cat:1.2)", steps=2, cfg=2.0, seed=5, size=(64, 64), manner=manner, variation=0.3)
    assert drawn(pipe, settings).size == (64, 64)


@pytest.mark.parametrize("manner", [*MANNERS])
def test_what_the_model_has_for_what_is_left_open_is_drawn_alike_when_it_is_said(pipe, tmp_path, manner):
    Image.effect_noise((50, 40), 50).convert("RGB").save(tmp_path / "photo.png")
    asked = Settings("a cat", seed=5, steps=3, manner=manner, init_image=str(tmp_path / "photo.png"))
    said = asked.filled(asked.completed(asked.request(), pipe.config))  # as a picture carries it
    assert said.sampler is not None and said.size is not None
    one, again = drawn(pipe, asked), drawn(pipe, said)
    assert one.size == again.size == said.size and one.tobytes() == again.tobytes()
    entry = album.entry(replace(asked, model="mini"), asked.request(), pipe)
    assert entry.settings.schedule == said.schedule and entry.settings.size == said.size


@pytest.mark.parametrize("sampler", ["dpm2", "dpm2_a", "dpmpp_2m_sde", "dpmpp_2s_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("manner", ["a1111", "comfyui"])
def test_enlarged_latents_are_drawn_again_by_any_sampler(pipe, manner, sampler):
    asked = Settings("a cat", sampler=sampler, manner=manner, hires=2.0, hires_by="latent", **USUAL)
    assert drawn(pipe, asked).size == (64, 48)


@pytest.mark.parametrize("by", ["lanczos", "latent"])
def test_both_passes_of_a_larger_drawing_have_the_programs_noise(pipe, by):
    usual = Settings("a cat", sampler="euler_a", hires=2.0, hires_by=by, **USUAL)
    seen: dict[str | None, list[Any]] = {}
    for rng in (None, "cpu", "philox"):
        seen[rng] = steps_of(pipe, replace(usual, rng=rng))
    last = {rng: steps[-1].latents for rng, steps in seen.items()}
    assert torch.equal(last[None], last["cpu"]) and not torch.allclose(last["cpu"], last["philox"])
    sizes = [tuple(step.x_t.shape[2:]) for step in seen["philox"]]
    assert sizes == [(12, 16)] * 3 + [(24, 32)]


@pytest.mark.parametrize(("sampler", "n"), [("DPM++ 2M", 4), ("Euler a", 3), ("Euler", 5)])
def test_a_whole_picture_of_a1111_is_the_same_when_it_is_written_as_there(pipe, sampler, n):
    """The web UI's way from a seed to pixels, written down anew in x₀ + σ ε, with the same networks."""
    given = parsed({"manner": "a1111", "sampler": sampler})
    settings = Settings("a cat", "a dog", steps=n, cfg=3.0, seed=9, size=(40, 24), **given)
    seen = steps_of(pipe, settings)
    picture = np.asarray(drawn(pipe, settings)).astype(int)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    levels = ((1 - (1 - betas).cumprod(0)) / (1 - betas).cumprod(0)).sqrt()

    def sigma_of(t: float) -> float:
        low = int(t)
        share, high = t - low, min(low + 1, 999)
        return float((levels[low].log() * (1 - share) + levels[high].log() * share).exp())

    if sampler == "DPM++ 2M":  # Automatic is Karras
        ends = levels[-1].item() ** (1 / 7), levels[0].item() ** (1 / 7)
        sigmas = [(ends[0] + k / (n - 1) * (ends[1] - ends[0])) ** 7 for k in range(n)] + [0.0]
    else:
        sigmas = [sigma_of(999 - 999 * k / (n - 1)) for k in range(n)] + [0.0]
    noises, shape = Philox(9), (4, 12, 20)
    words = {side: pipe.encode_text([text]) for side, text in (("yes", "a cat"), ("no", "a dog"))}
    unet = pipe.models["diffusion"]

    def denoised(x: torch.Tensor, sigma: float) -> torch.Tensor:
        logs = levels.log().numpy()
        t = torch.tensor([float(np.interp(np.log(sigma), logs, np.arange(1000)))])
        with torch.inference_mode():
            yes, no = (unet(x / (sigma**2 + 1) ** 0.5, words[side], t) for side in ("yes", "no"))
        return x - sigma * (no + 3.0 * (yes - no))

    x, old = noises.randn(shape)[None] * sigmas[0], None
    for k, (sigma, later) in enumerate(pairwise(sigmas)):
        d = denoised(x, sigma)
        if sampler == "Euler":
            x = x + (x - d) / sigma * (later - sigma)
        elif sampler == "Euler a":
            up = min(later, (later**2 * (sigma**2 - later**2) / sigma**2) ** 0.5)
            x = x + (x - d) / sigma * ((later**2 - up**2) ** 0.5 - sigma)
            x = x + up * noises.randn(shape)[None] if later > 0 else x
        else:
            best = d
            if old is not None and later > 0:
                r = np.log(sigmas[k - 1] / sigma) / np.log(sigma / later)
                best = (1 + 1 / (2 * r)) * d - 1 / (2 * r) * old
            x, old = later / sigma * x + (1 - later / sigma) * best, d
    torch.testing.assert_close(seen[-1].latents, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())
    with torch.inference_mode():
        pixels = ((pipe.models["decoder"](x)[0] + 1) / 2).clamp(0, 1)
    theirs = (255 * pixels.permute(1, 2, 0).numpy()).astype(np.uint8).astype(int)
    assert np.abs(picture - theirs).max() <= 1 and (picture == theirs).mean() > 0.97


def test_a_picture_that_was_drawn_by_our_name_is_drawn_by_it_again():
    carried = {"manner": "comfyui", "sampler": "ddim", "prompt": "a cat"}
    assert from_carried(carried).request().sampler == "ddim"
    with pytest.raises(ValueError, match="dpmpp_sde is another sampler in ComfyUI; take dpmpp_2m_sde"):
        from_carried(carried | {"sampler": "dpmpp_sde"}).request()


def test_layers_that_a_program_leaves_out_are_counted_as_there():
    """Of SD 2 and SDXL, which leave one out anyway: A1111 has nothing to say in it, and others call it 2."""
    said = {
        name: [left_out(skip, config, manner) for config in (SD15, tiny_sdxl.TINY) for skip in (0, 1, 2)]
        for name, manner in (MANNERS | {"": Manner()}).items()
    }
    assert said[""] == said["diffusers"] == [0, 1, 2, 0, 1, 2]
    assert said["a1111"] == [0, 1, 2, 0, 0, 0] and said["comfyui"] == said["sdcpp"] == [0, 1, 2, 0, 0, 1]


def test_steps_that_there_are_not_are_refused_before_a_model_is_loaded(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    asked = Settings("a", init_image=str(tmp_path / "a.png"), steps=30, strength=0.02, manner="comfyui")
    with pytest.raises(ValueError, match=r"strength of 0\.02, 30 steps are the last of 1500, and 1000 is"):
        asked.request()
