"""Schedules: the values of other programs, and what each promises for any number of steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reifusion.model.ddpm import DDPMSampler
from reifusion.model.flow import FlowSampler
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES, place_of, sigma_at
from reifusion.sampling.elsewhere import SCHEDULES_ELSEWHERE
from reifusion.sampling.schedules import TITLES, beta_quantile

TABLE = DDPMSampler()._training_sigmas()
every_schedule = pytest.mark.parametrize("name", SCHEDULES)

# Computed with k-diffusion, ComfyUI and stable-diffusion.cpp for SD 1.5; after the last comes 0.
FOUR = {
    "normal": (14.614641, 2.918307, 0.932358, 0.029167),
    "sgm_uniform": (14.614641, 4.086081, 1.61558, 0.69515),
    "karras": (14.614641, 3.168603, 0.446918, 0.029167),
    "exponential": (14.614641, 1.840024, 0.231664, 0.029167),
    "polyexponential": (14.614641, 0.462218, 0.058195, 0.029167),
    "simple": (14.614641, 4.081729, 1.612886, 0.693205),
    "ddim_uniform": (4.116696, 1.623692, 0.698398, 0.041314),
    "beta": (14.614641, 5.686591, 1.618279, 0.515391),
    "kl_optimal": (14.614641, 1.597066, 0.572914, 0.029167),
    "align_your_steps": (14.614641, 3.226626, 1.394381, 0.509389),
}
TEN = {
    "normal": "14.614641 7.839883 4.609174 2.918307 1.950161 1.344928 .932358 .624977 .368658 .029167",
    "sgm_uniform": "14.614641 8.307172 5.092408 3.325069 2.27973 1.61558 1.162865 .831884 .571189 .343705",
    "beta": "14.614641 11.542771 7.371844 4.372802 2.615236 1.618279 1.027329 .654885 .39551 .199059",
    "karras": "14.61464 9.10294 5.4784 3.16861 1.74942 .91408 .44692 .2014 .08191 .02917",
    "exponential": "14.61464 7.32488 3.67124 1.84003 .92223 .46222 .23167 .11611 .0582 .02917",
}


def sigmas(name: str, n: int) -> list[float]:
    return sigma_at(SCHEDULES[name](TABLE, n), TABLE).tolist()


@pytest.mark.parametrize("name", FOUR)
def test_four_steps_are_those_of_other_programs(name: str) -> None:
    assert sigmas(name, 4) == pytest.approx(FOUR[name], abs=2e-6)


@pytest.mark.parametrize("name", TEN)
def test_ten_steps_are_those_of_other_programs(name: str) -> None:
    assert sigmas(name, 10) == pytest.approx([float(x) for x in TEN[name].split()], abs=2e-5)


def test_some_schedules_have_other_numbers_of_steps_as_in_comfyui() -> None:
    assert [len(sigmas("beta", n)) for n in (150, 200, 300, 500)] == [149, 199, 293, 475]
    assert [len(sigmas("ddim_uniform", n)) for n in (7, 10, 15, 30, 32)] == [8, 10, 16, 31, 33]
    sampler = SAMPLERS["euler"]()
    sampler.set_inference_timesteps(7, "ddim_uniform")
    assert sampler.num_inference_steps == len(sampler.timesteps) == 8
    sampler.set_strength(0.5)
    assert len(sampler.timesteps) == 4


@every_schedule
@pytest.mark.parametrize("zero", [False, True])
def test_any_number_of_steps_falls_through_the_training_steps(name: str, zero: bool) -> None:
    table = DDPMSampler(prediction_type="v_prediction", zero_terminal_snr=zero)._training_sigmas()
    for n in (*range(1, 40), 99, 333, 500, 998, 999, 1000):
        places = SCHEDULES[name](table, n)
        assert places.dtype == torch.float64 and len(places) >= 1
        assert places.min() >= 0 and places.max() <= 999 and (places.diff() < 0).all()
        if name not in ("beta", "ddim_uniform"):
            assert len(places) == n
        if name not in ("leading", "ddim_uniform"):  # which the training of Stable Diffusion began below
            assert places[0] == pytest.approx(999) or name.startswith("align")


@every_schedule
@pytest.mark.parametrize(
    "sampler", ["ddim", "ddpm", "euler_a", "heun", "lms", "dpmpp_2m", "unipc", "lcm", "dpm2"]
)
def test_every_schedule_is_walked_by_every_kind_of_sampler_to_a_known_picture(
    name: str, sampler: str
) -> None:
    ours = SAMPLERS[sampler](torch.Generator().manual_seed(1))
    ours.set_inference_timesteps(9, name)
    x0 = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(2)).double()
    x = ours.add_noise(
        x0, ours.timesteps[0], torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    )
    for t in ours.timesteps:
        seen = ours.scale_model_input(x, t)
        assert seen.std().item() == pytest.approx(1, abs=0.35)
        signal, noise = ours._signal_and_noise(t, seen)
        x = ours.step(t, x, (seen - signal * x0) / noise)
    # DDIM ends with the noise of timestep 0, LCM with the more of its input the smaller t is.
    assert (x - x0).std().item() < {"ddim": 0.04, "lcm": 0.1}.get(sampler, 1e-9)


def test_flow_is_visited_at_its_own_sigma() -> None:
    sampler = FlowSampler(shift=3.0)
    sampler.set_inference_timesteps(4, "simple")
    # ComfyUI's for SD 3: every 250th of 3 s / (1 + 2 s), s = 1, 0.999, … 0.001
    assert sampler.sigmas == pytest.approx([3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25)] + [0])
    sampler.set_inference_timesteps(3, "karras")
    least = 3 * 0.001 / 1.002
    middle = ((1 + least ** (1 / 7)) / 2) ** 7
    assert sampler.sigmas == pytest.approx([1, middle, least, 0], rel=1e-6)


def test_places_and_sigmas_are_each_others_reverse() -> None:
    sigma = torch.tensor([14.6, 3.0, 0.5, 0.03], dtype=torch.float64)
    torch.testing.assert_close(sigma_at(place_of(sigma, TABLE), TABLE), sigma, rtol=1e-12, atol=0)
    assert place_of(TABLE[123], TABLE).item() == pytest.approx(123)


def test_the_quantiles_of_beta_are_those_of_a_million_draws() -> None:
    drawn = np.sort(np.random.default_rng(0).beta(0.6, 0.6, 1_000_000))
    for one in (0.01, 0.1, 0.3, 0.5, 0.8, 0.99):
        assert beta_quantile(np.array([one]), 0.6)[0] == pytest.approx(drawn[int(one * 1e6)], abs=2e-3)
    assert beta_quantile(np.array([0.0, 1.0]), 0.6).tolist() == pytest.approx([0, 1], abs=1e-12)
    # Beta(½, ½) is the arcsine distribution, and Beta(1, 1) is even
    share = np.linspace(0, 1, 11)
    assert beta_quantile(share, 0.5) == pytest.approx(np.sin(math.pi / 2 * share) ** 2, abs=1e-9)
    assert beta_quantile(share, 1.0) == pytest.approx(share, abs=1e-12)


def test_every_schedule_has_its_names_elsewhere() -> None:
    assert set(SCHEDULES_ELSEWHERE) == set(SCHEDULES) and set(TITLES) < set(SCHEDULES)
    assert len(set(TITLES.values())) == len(TITLES)
