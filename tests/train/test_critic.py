"""The critic's promises: which weights learn from which term, what the critic sees, and that it helps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from reifusion.train.critic import Critic, fool, judge
from reifusion.train.vae import differences

SMALL = (4, 8)  # channels of a critic that is quick to test


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def discs(count: int, side: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random sharp discs on random grounds, (count, 3, side, side), and the same pictures blurred."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(side).float()
    centre = torch.rand(count, 2, 1, 1, generator=generator) * side
    radius = (0.15 + 0.25 * torch.rand(count, 1, 1, generator=generator)) * side
    distance = ((rows[:, None] - centre[:, 0]) ** 2 + (rows[None, :] - centre[:, 1]) ** 2).sqrt()
    inside = (radius - distance + 0.5).clamp(0, 1)[:, None]  # (count, 1, side, side)
    ink, ground = 2 * torch.rand(2, count, 3, 1, 1, generator=generator) - 1
    sharp = inside * ink + (1 - inside) * ground
    return sharp, F.avg_pool2d(F.pad(sharp, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def trained(steps: int) -> Critic:
    critic = Critic(channels=(16, 32))
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3, (0.9, 0.99))
    for step in range(steps):
        optimizer.zero_grad()
        judge(critic, *discs(8, seed=step))[0].backward()
        optimizer.step()
    return critic


def test_a_score_speaks_for_38_pixels_and_scores_are_8_pixels_apart():
    critic = Critic()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = critic(image)[-1]
    assert scores.shape == (1, 1, 16, 16)

    def seen(row: int) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(scores[0, 0, row, 8], image, retain_graph=True)
        return gradient.abs().sum((0, 1, 3)).nonzero()[:, 0]

    here, below = seen(7), seen(8)
    assert len(here) == here[-1] - here[0] + 1 == 38
    assert torch.equal(below, here + 8)


def test_features_halve_the_picture_layer_by_layer():
    shapes = [tuple(layer.shape) for layer in Critic(channels=SMALL)(torch.randn(2, 3, 24, 16))]
    assert shapes == [(2, 4, 12, 8), (2, 8, 6, 4), (2, 1, 6, 4)]


def test_fool_teaches_the_picture_only_and_judge_the_critic_only():
    critic, real = Critic(channels=SMALL), torch.randn(2, 3, 16, 16)
    for term in fool(critic, real, made := torch.randn(2, 3, 16, 16, requires_grad=True)):
        term.backward(retain_graph=True)
        assert made.grad is not None and made.grad.abs().sum() > 0
        assert all(weight.grad is None for weight in critic.parameters())
        made.grad = None
    judge(critic, real, made)[0].backward()
    assert made.grad is None and real.grad is None
    # A constant added to every score cancels out, so the bias of the scores learns nothing.
    silent = {name for name, w in critic.named_parameters() if w.grad is None or w.grad.abs().sum() < 1e-6}
    assert silent == {"score.bias"}


def test_one_backward_gives_both_networks_what_two_would_have():
    """The textbook makes a backward pass for each network and then discards the gradients of the other."""
    critic, decoder = Critic(channels=SMALL), torch.nn.Conv2d(4, 3, 1)
    real, latents = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 16, 16)
    made = decoder(latents)
    adversarial, matching = fool(critic, real, made)
    (adversarial + matching + judge(critic, real, made)[0]).backward()
    together = [w.grad for w in (*decoder.parameters(), *critic.parameters())]

    def textbook(with_respect_to, term):
        return list(torch.autograd.grad(term, list(with_respect_to.parameters())))

    made = decoder(latents)
    *theirs, real_scores = critic(real)
    *ours, made_scores = critic(made)
    term = -F.logsigmoid(made_scores - real_scores).mean()
    term = term + sum((a - b).abs().mean() for a, b in zip(theirs, ours, strict=True)) / len(SMALL)
    apart = textbook(decoder, term)
    term = -F.logsigmoid(critic(real)[-1] - critic(made.detach())[-1]).mean()
    jacobian = torch.autograd.functional.jacobian(
        lambda x: critic(x)[-1].sum(), real, create_graph=True
    )  # (2, 3, 16, 16)
    apart += textbook(critic, term + 0.1 / 2 * jacobian.pow(2).sum() / real_scores.numel())
    for one, other in zip(together, apart, strict=True):
        assert one is not None and torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_perfect_reconstruction_is_a_draw():
    critic, real = Critic(channels=SMALL), torch.randn(2, 3, 16, 16)
    adversarial, matching = fool(critic, real, real.clone())
    assert adversarial.item() == pytest.approx(math.log(2), rel=1e-6)
    assert matching == 0
    loss, right = judge(critic, real, real.clone(), r1=0.0)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert right == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_a_batch_in_halves_has_the_loss_of_the_whole(half, high, wide):
    """So several processes, or accumulated parts, train like a single one."""
    critic = Critic(channels=SMALL)
    real, made = torch.randn(2, 2 * half, 3, 4 * high, 4 * wide)

    def terms(part: slice) -> torch.Tensor:
        return torch.stack([*fool(critic, real[part], made[part]), *judge(critic, real[part], made[part])])

    halves = (terms(slice(0, half)) + terms(slice(half, None))) / 2
    assert torch.allclose(halves, terms(slice(None)), rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    critic = Critic(channels=SMALL).double()
    real, made = torch.randn(2, 1, 3, 8, 8, dtype=torch.float64)
    made.requires_grad_()
    for i in range(2):
        assert torch.autograd.gradcheck(lambda y, i=i: fool(critic, real, y)[i], made)
    weights = dict(critic.named_parameters())
    found = torch.autograd.grad(judge(critic, real, made, r1=0.5)[0], list(weights.values()))
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        direction, values = torch.randn_like(weight), []
        for h in (1e-6, -1e-6):
            weight.data.add_(direction, alpha=h)
            values.append(judge(critic, real, made, r1=0.5)[0].item())
            weight.data.add_(direction, alpha=-h)
        expected = (values[0] - values[1]) / 2e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-8), name


def test_half_precision_points_the_same_way():
    critic = Critic(channels=(16, 32))
    real, made = discs(4)
    made.requires_grad_()
    weights = [w for name, w in critic.named_parameters() if name != "score.bias"]  # its gradient is 0

    def directions(half: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = fool(critic, real, made)[0] + judge(critic, real, made)[0]
        return list(torch.autograd.grad(loss, [made, *weights]))

    for exact, rough in zip(directions(False), directions(True), strict=True):
        assert F.cosine_similarity(exact.flatten(), rough.flatten(), dim=0) > 0.98


def test_critic_learns_to_see_blur_and_its_gradient_takes_blur_away():
    critic = trained(60)
    sharp, blurred = discs(32, seed=1000)  # never seen in training
    with torch.no_grad():
        scores = [critic(x)[-1] for x in (sharp, blurred)]
    # Patches of a single colour are the same in both; the critic must tell the others apart.
    busy = F.avg_pool2d((sharp - blurred).abs().mean(1, keepdim=True), 4) > 0.02
    assert (scores[0] > scores[1])[busy].float().mean() > 0.95
    # After one small step along −∇ of the decoder's term, edges are nearer to those of the sharp picture.
    blurred.requires_grad_()
    (gradient,) = torch.autograd.grad(fool(critic, sharp, blurred)[0], blurred)
    stepped = (blurred - 0.1 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)).detach()

    def edges(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([g.pow(2).sum((1, 2, 3)) for g in differences(x)]).sum(0)  # (B,)

    grown = (edges(stepped) - edges(blurred)) / (edges(sharp) - edges(blurred))
    assert grown.min() > 0.01


def test_the_penalty_makes_the_critic_less_steep():
    def steepness(r1: float) -> float:
        torch.manual_seed(0)
        critic = Critic(channels=(16, 32))
        optimizer = torch.optim.AdamW(critic.parameters(), 2e-3, (0.9, 0.99))
        for step in range(25):
            optimizer.zero_grad()
            judge(critic, *discs(8, seed=step), r1=r1)[0].backward()
            optimizer.step()
        sharp, blurred = discs(8, seed=1000)
        blurred.requires_grad_()
        (gradient,) = torch.autograd.grad(fool(critic, sharp, blurred)[0], blurred)
        return gradient.norm().item()

    assert steepness(1.0) < 0.5 * steepness(0.0)
