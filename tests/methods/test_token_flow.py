"""The generator's loss on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glm_training.methods.token_flow import TokenFlow
from glm_training.models.vgt.generator import Prediction
from glm_training.models.vgt.sequence import Prompts, raster_order
from glm_training.models.vgt.tiny_generator import tiny_random_generator

PROMPTS = Prompts.of([[1], [2, 3]], pad_id=0)
LATENTS = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
"""[2, 2, 1, 2]: tokens (1, 0), (2, 4) of the first image, zeros of the second."""
NOISE = torch.tensor([[[[0.0, 1.0]], [[2.0, 0.0]]], [[[1.0, 2.0]], [[0.0, 0.0]]]])


class Policy:
    """Answers with what it is given, and keeps what it was asked."""

    def __init__(self, velocity: Tensor, features: Tensor | None = None) -> None:
        self.prediction = Prediction(velocity, features)
        self.asked: tuple[Any, ...] = ()

    def __call__(self, *given: Any) -> Prediction:
        self.asked = given
        return self.prediction


def test_flow_by_hand() -> None:
    policy = Policy(torch.ones(2, 2, 2, dtype=torch.bfloat16, requires_grad=True))
    order = raster_order(2)
    # sigmoid(0) = .5 with shift 1: t = .5; far out: t = 1 and 0
    draws = torch.tensor([[0.0, -1e4], [1e4, 0.0]])
    term = TokenFlow(time_shift=1.0).loss(policy, PROMPTS, LATENTS, order, draws=draws, noise=NOISE)
    prompts, latents, given_order, noisy, times = policy.asked
    assert prompts is PROMPTS and latents is LATENTS and given_order is order
    assert times.tolist() == [[0.5, 1.0], [0.0, 0.5]]
    assert noisy.tolist() == [[[0.5, 1.0], [2.0, 4.0]], [[1.0, 0.0], [1.0, 0.0]]]
    # targets (1, -2), (1, 4) and (-1, 0), (-2, 0); errors 0 9, 0 9 and 4 1, 9 1
    assert term.each["loss"].tolist() == [4.5, 3.75] and term.loss.item() == 4.125
    assert term.loss.dtype == torch.float32 and term.rows == 2
    assert term.metrics == {"flow_loss": torch.tensor(4.125)}
    shifted = TokenFlow().loss(policy, PROMPTS, LATENTS, order, draws=torch.zeros(2, 2), noise=NOISE)
    assert policy.asked[4].flatten().tolist() == pytest.approx([1 / 2.4] * 4) and shifted.loss.item() == 4.125


def test_alignment_by_hand() -> None:
    features = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 5.0]]], requires_grad=True)
    teacher = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[-1.0, 0.0], [3.0, 4.0]]], requires_grad=True)
    policy = Policy(torch.zeros(2, 2, 2), features)
    given = {"draws": torch.zeros(2, 2), "noise": NOISE}
    term = TokenFlow(repa_weight=0.5).loss(policy, PROMPTS, LATENTS, raster_order(2), **given, teacher=teacher)
    # cosines 1 0 and -1 .8; targets' squares 1 4 1 16 and 1 0 4 0
    assert term.metrics["repa_loss"].item() == pytest.approx(-(0.5 - 0.1) / 2)
    assert term.each["loss"].tolist() == pytest.approx([5.5 - 0.5 * 0.5, 1.25 + 0.5 * 0.1])
    assert term.loss.item() == pytest.approx((5.5 + 1.25) / 2 - 0.5 * 0.2)
    term.loss.backward()
    assert teacher.grad is None
    # d(-cos)/d(1, 0) towards (0, 1) is (0, -1); over 4 tokens, times .5
    assert features.grad[0, 1].tolist() == pytest.approx([0.0, -0.125])
    for answers, kept in ((Policy(torch.zeros(2, 2, 2)), teacher), (policy, None)):
        with pytest.raises(ValueError, match="go together"):
            TokenFlow().loss(answers, PROMPTS, LATENTS, raster_order(2), **given, teacher=kept)
    with pytest.raises(ValueError, match=r"must be \[2, 2, 2\], got \[2, 1, 2\]"):
        TokenFlow().loss(policy, PROMPTS, LATENTS, raster_order(2), **given, teacher=teacher[:, :1])


def test_the_first_gradient_of_one_token_by_hand() -> None:
    """At the start the velocity is 0 and the last layer sees LayerNorm(W x_t + b): its gradient is -2/C target times
    that, and nothing else moves."""
    generator = tiny_random_generator(grid=(1, 1))
    generator.head.latent_in.bias.data.normal_(generator=torch.Generator().manual_seed(0))
    latents = torch.tensor([1.0, -2.0, 0.5, 3.0]).view(1, 4, 1, 1)
    noise = torch.tensor([0.5, 1.0, -1.0, 2.0]).view(1, 4, 1, 1)
    prompts = generator.encode_prompts(["a red circle"])
    draws = torch.zeros(1, 1)
    TokenFlow().loss(generator, prompts, latents, raster_order(1), draws=draws, noise=noise).loss.backward()
    target = torch.tensor([0.5, -3.0, 1.5, 1.0])
    time = 1 / 2.4  # 1 - 1.4 * .5 / 1.2
    noisy = time * latents.flatten() + (1 - time) * noise.flatten()
    hidden = generator.head.latent_in.weight @ noisy + generator.head.latent_in.bias
    centred = hidden - hidden.mean()
    normed = centred / (centred.square().mean() + 1e-6).sqrt()
    torch.testing.assert_close(generator.head.out.bias.grad, -2 * target / 4)
    torch.testing.assert_close(generator.head.out.weight.grad, torch.outer(-2 * target / 4, normed.detach()))
    others = [p.grad for name, p in generator.named_parameters() if not name.startswith("head.out.")]
    assert all(grad is None or grad.abs().max() == 0 for grad in others)
