"""Trajectory consistency distillation: the sampler of networks, and LoRAs, that were distilled for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.samplers import LCMSampler


class TCDSampler(LCMSampler):
    """Zheng et al. 2024, "Trajectory Consistency Distillation", arXiv:2402.19159.

    Each step jumps further than it is asked to, to the timestep s = (1 - γ) t', and then adds noise up to t'.
    γ is `eta`.
    """

    name, title = "tcd", "TCD"
    eta = 0.3

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        t, last = self.timesteps[i], i == len(self.timesteps) - 1
        x0, eps = self.predict(t, x, model_output)
        later = torch.tensor(0) if last else self.timesteps[i + 1]
        # Algorithm 4, Zheng et al. 2024: s = ⌊(1 - γ) t'⌋
        s = ((1 - (self.eta or 0.0)) * later.double()).floor().long()
        alpha_bar_s, alpha_bar = self.alpha_bar(s).item(), self.alpha_bar(later).item()
        # x_s = √ᾱ_s x₀ + √(1 - ᾱ_s) ε
        x = math.sqrt(alpha_bar_s) * x0 + math.sqrt(1 - alpha_bar_s) * eps
        if last or not self.eta:
            return x
        # x' = √(ᾱ' / ᾱ_s) x_s + √(1 - ᾱ' / ᾱ_s) z
        ratio = alpha_bar / alpha_bar_s
        return math.sqrt(ratio) * x + math.sqrt(1 - ratio) * self._noise(x)
