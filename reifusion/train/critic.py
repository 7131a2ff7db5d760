"""A critic: it learns to tell pictures from their reconstructions, and so tells the decoder what is blurred.

It scores patches instead of whole pictures, because only detail concerns it: the L1 and L2 losses take care
of the rest. And it compares a patch with its own reconstruction, so that the content of the patch cancels
out. In the usual separate scores, content outweighs the effect of blur: with them, 300 steps on the mini's
pictures lowered a hinge loss by only 2 %.

Critic and decoder learn in the same step from one loss. `fool` detaches the critic's weights and `judge` the
pictures. So each gradient reaches only its own network, and one optimizer serves both.

Source: Isola et al. 2017, §3.2.2 (patches); Esser et al. 2021, §3.1 (a critic for an autoencoder);
Jolicoeur-Martineau 2019 (comparing instead of scoring); Mescheder et al. 2018 (what keeps it from jumping).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F


class Critic(nn.Module):
    """Pictures -> a score for each patch of 38×38 pixels, one every 8 pixels; higher means more real."""

    def __init__(self, in_channels: int = 3, channels: tuple[int, ...] = (32, 64, 128)):
        super().__init__()
        before = in_channels
        self.down = nn.ModuleList()
        for now in channels:
            self.down.append(nn.Conv2d(before, now, 4, stride=2, padding=1))
            before = now
        self.score = nn.Conv2d(before, 1, 3, padding=1)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> the features of each layer, and last the scores (B, 1, H/8, W/8).

        With fewer `channels`, a critic halves the picture fewer times, and its patches are smaller.
        """
        seen, x = [], image
        for layer in self.down:
            x = F.leaky_relu(layer(x), 0.2)  # (B, 3, H, W) -> (B, 32, H/2, W/2) -> … -> (B, 128, H/8, W/8)
            seen.append(x)
        return [*seen, self.score(x)]


def fool(critic: Critic, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the decoder's two terms, for pictures and their reconstructions (B, 3, H, W).

    The first is log 2 if both look equally real and falls as `made` looks more real; the second is the
    distance of their features. Both send gradients only to `made`.
    """
    still = {name: weight.detach() for name, weight in critic.named_parameters()}
    *theirs, real_scores = functional_call(critic, still, (real.detach(),))
    *ours, made_scores = functional_call(critic, still, (made,))
    # [fooling] Eq. 2, Huang et al. 2024: −log sigmoid(D(x̂) − D(x)), for a patch and its own reconstruction
    adversarial = F.softplus(real_scores.to(real.dtype) - made_scores.to(real.dtype)).mean()
    # [matching] Eq. 4, Wang et al. 2018: ‖D_i(x) − D_i(x̂)‖₁ / N_i, averaged over the layers i
    matching = torch.stack(
        [F.l1_loss(b.to(real.dtype), a.to(real.dtype)) for a, b in zip(theirs, ours, strict=True)]
    ).mean()
    return adversarial, matching


def judge(critic: Critic, real: Tensor, made: Tensor, r1: float = 0.1) -> tuple[Tensor, Tensor]:
    """Returns the critic's own loss and the share of patches it gets right, for pictures (B, 3, H, W).

    The loss is log 2 for a critic that sees no difference, and 0 for one that is sure and right. Its
    gradients go only to the critic's weights. r1: weight of the penalty on steepness, which keeps the
    gradients of `fool` small.
    """
    real = real.detach().requires_grad_()
    real_scores, made_scores = (critic(x)[-1].to(real.dtype) for x in (real, made.detach()))
    # [critic] Jolicoeur-Martineau 2019: −log sigmoid(D(x) − D(x̂))
    compared = F.softplus(made_scores - real_scores).mean()
    # [steepness] Eq. 9, Mescheder et al. 2018: γ/2 E‖∇D(x)‖² on real pictures, here divided by their patches
    (slope,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
    penalty = r1 / 2 * slope.pow(2).sum() / real_scores.numel()
    return compared + penalty, (real_scores > made_scores).float().mean().detach()
