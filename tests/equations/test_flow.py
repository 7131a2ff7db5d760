"""Chapter 11: rectified flow."""

import numpy as np
import torch

from reifusion.model.samplers import FlowSampler
from tests.equations.check import Pair, checks, normal

X0, NOISE = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)


@checks("flow-path")
def point_on_the_line() -> Pair:
    sigma = np.array([0.03, 0.5, 1.0])
    ours = FlowSampler().add_noise(torch.tensor(X0), torch.tensor(1000 * sigma), torch.tensor(NOISE))
    sigma = sigma.reshape(3, 1, 1, 1)
    return ours, (1 - sigma) * X0 + sigma * NOISE


@checks("flow-velocity")
def direction_of_the_line() -> Pair:
    return FlowSampler().velocity(torch.tensor(X0), 500, torch.tensor(NOISE)), NOISE - X0


@checks("flow-euler")
def step_against_the_velocity() -> Pair:
    sampler, n = FlowSampler(), 5
    sampler.set_inference_timesteps(n)
    x, v = torch.tensor(NOISE), normal(n, *NOISE.shape, seed=2)
    path, sigmas = [x], np.linspace(1, 0, n + 1)
    for i, t in enumerate(sampler.timesteps):
        path.append(x := sampler.step(t, x, torch.tensor(v[i])))
    ours = torch.stack(path).numpy()
    return ours[1:], [ours[i] + (sigmas[i + 1] - sigmas[i]) * v[i] for i in range(n)]
