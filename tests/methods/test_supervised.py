"""Supervised losses of both halves on numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glm_training.methods.supervised import FlowMatching, TokenCrossEntropy
from tests.methods.toys import ToyVelocity, condition_of, prompt_of

LOG_PROBS = -torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2.0, 3.0, 0.0, 0.0, 8.0, 6.0]])
"""Preview means 1.5 and 2.5, of both rows 2; large means 4.5 and 3.5, of both rows 4."""


def test_both_grids_are_means_of_their_own_under_their_weights():
    targets = torch.arange(12).view(2, 6)
    seen = []
    term = TokenCrossEntropy(preview_weight=1.0, large_weight=3.0).loss(
        lambda prompt, tokens: (seen.append(tokens), LOG_PROBS)[1], prompt_of(2), targets
    )
    assert seen[0] is targets
    assert term.loss.item() == pytest.approx((1 * 2 + 3 * 4) / 4)
    assert (term.metrics["preview_loss"], term.metrics["large_loss"], term.rows) == (2, 4, 2)
    plain = TokenCrossEntropy(1.0, 1.0).loss(lambda prompt, tokens: LOG_PROBS, prompt_of(2), targets)
    assert plain.loss.item() == 3, "not the mean 10/3 over tokens"


def test_without_a_preview_the_large_grid_is_all():
    log_probs = LOG_PROBS[:, 2:].clone().requires_grad_(True)
    term = TokenCrossEntropy(5.0, 3.0).loss(lambda *_: log_probs, prompt_of(2, preview=False), torch.zeros(2, 4))
    assert term.loss.item() == 4 and set(term.metrics) == {"large_loss"}
    term.loss.backward()
    assert log_probs.grad.flatten().tolist() == [-0.125] * 8
    assert not term.metrics["large_loss"].requires_grad


class Levels:
    """Stands for the DiT half: its noise levels, here u / 2 at timestep 1000 u, and what it drops."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def training_sigmas(self, u, height, width):
        self.asked.append((height, width))
        return 1000 * u, u / 2

    def drop_condition(self, condition, drop):
        self.asked.append(drop.tolist())
        return SimpleNamespace(condition=condition, drop=drop)


CLEAN = torch.tensor([[[[1.0, -2.0]]], [[[3.0, 0.0]]]])
NOISE = torch.tensor([[[[0.5, 1.0]]], [[[-1.0, 2.0]]]])


def flow_term(policy, component, drop):
    return FlowMatching().loss(
        policy, component, CLEAN, condition_of(2), noise=NOISE, u=torch.tensor([0.5, 0.8]), drop=torch.tensor(drop)
    )


def test_flow_matching_asks_for_noise_minus_image_at_the_shifted_level():
    policy, component = ToyVelocity(2.0), Levels()
    term = flow_term(policy, component, [False, False])
    (call,) = policy.calls
    noisy = [[0.75 * 1 + 0.25 * 0.5, 0.75 * -2 + 0.25], [0.6 * 3 - 0.4, 0.4 * 2]]
    torch.testing.assert_close(call["latents"].flatten(1), torch.tensor(noisy))
    assert call["times"].tolist() == [500, 800]
    errors = [2 * x + t - (e - c) for (x, t, e, c) in zip(
        sum(noisy, []), (0.5, 0.5, 0.8, 0.8), NOISE.flatten().tolist(), CLEAN.flatten().tolist(), strict=True
    )]  # fmt: skip
    assert term.loss.item() == pytest.approx(sum(error**2 for error in errors) / 4, rel=1e-6)
    assert term.metrics["flow_loss"] == term.loss and term.rows == 2
    assert component.asked == [(32, 32)], "nothing to drop"
    (gradient,) = torch.autograd.grad(term.loss, policy.weight)
    wanted = sum(2 * error * x for error, x in zip(errors, sum(noisy, []), strict=True)) / 4
    assert gradient.item() == pytest.approx(wanted, rel=1e-6)


def test_rows_are_trained_without_their_condition_where_drop_says_so():
    policy, component = ToyVelocity(2.0), Levels()
    flow_term(policy, component, [False, True])
    assert component.asked[-1] == [False, True] and policy.calls[0]["condition"].drop.tolist() == [False, True]
