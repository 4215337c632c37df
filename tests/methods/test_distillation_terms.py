"""The losses of distribution matching on a network of one matrix with an adapter, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from glm_training.methods.distillation import BackwardSimulation, Dynamics, Scores, fake_score_loss, generator_loss
from glm_training.methods.preference import level_weights
from glm_training.models.denoising import Denoiser, Levels
from glm_training.models.lora import ADAPTER, add_lora

GENERATED = torch.tensor([[[[1.0, -2.0]]], [[[3.0, 0.5]]]])
NOISE = torch.tensor([[[[0.5, 1.0]]], [[[-1.0, 2.0]]]])
U = torch.tensor([0.25, 0.8])


class Flow(Denoiser):
    """x = (1 - u) x0 + u e, the network predicts e - x0; a sampler starts at u 1 and goes down in equal steps."""

    prediction = "velocity"

    def __init__(self, renoises: bool = False) -> None:
        self.renoises = renoises

    def levels(self, u):
        return Levels(1000 * u, 1 - u, u)

    def sampling_levels(self, steps):
        return self.levels(torch.linspace(1, 0, steps + 1)[:-1])

    def predict(self, network, noisy, levels, condition, *, guidance_scale=1.0):
        return network(noisy, levels.timestep, condition, guidance_scale)


class Layer(nn.Module):
    """velocity = guidance * (W x) with W = diag(0.5, 2) and an adapter of alpha / rank 3 that adds ((0, 1), (0, 0))."""

    def __init__(self) -> None:
        super().__init__()
        self.to_v = nn.Linear(2, 2, bias=False)
        self.to_v.weight.data = torch.tensor([[0.5, 0.0], [0.0, 2.0]])
        add_lora(self, ["to_v"], rank=1, alpha=3.0)
        self.to_v.lora_A[ADAPTER].weight.data = torch.tensor([[0.0, 1.0]])
        self.to_v.lora_B[ADAPTER].weight.data = torch.tensor([[1 / 3], [0.0]])

    def forward(self, noisy, timestep, condition, guidance_scale):
        return guidance_scale * self.to_v(noisy)


def clean(noisy: list[float], u: float, scale: float, guidance: float = 1.0) -> list[float]:
    """x - u v, written out."""
    first, second = noisy
    return [first - u * guidance * (0.5 * first + scale * second), second - u * guidance * 2 * second]


def renoised(row: int) -> list[float]:
    u = U[row].item()
    pairs = zip(GENERATED[row].flatten().tolist(), NOISE[row].flatten().tolist(), strict=True)
    return [(1 - u) * x0 + u * e for x0, e in pairs]


def scores_of(fake_scale: float = 0.75, guidance_scale: float = 1.5) -> Scores:
    layer = Layer()
    return Scores(Flow(), layer, layer, fake_scale, guidance_scale)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_real_and_fake_score_are_the_teacher_at_their_own_strengths(scale):
    scores, noisy = scores_of(), torch.tensor([renoised(0), renoised(1)]).view(2, 1, 1, 2)
    levels = scores.denoiser.levels(U)
    real, fake = scores.real(noisy, levels, None, scale), scores.fake(noisy, levels, None)
    for row in (0, 1):
        assert real[row].flatten().tolist() == pytest.approx(clean(renoised(row), U[row].item(), scale, 1.5), rel=1e-5)
        assert fake[row].flatten().tolist() == pytest.approx(clean(renoised(row), U[row].item(), 0.75), rel=1e-5)
    assert not real.requires_grad and not fake.requires_grad
    assert scores.module.to_v.scaling[ADAPTER] == 3


def test_the_generator_is_led_by_the_difference_of_the_scores():
    """Gradient (p_r - p_f) / mean |p_r| / numel, loss half the mean square of the first quotient."""
    generated = GENERATED.clone().requires_grad_(True)
    term = generator_loss(scores_of(), generated, None, noise=NOISE, u=U, real_scale=0.25)
    term.loss.backward()
    wanted, gaps = [], []
    for row in (0, 1):
        u, x0 = U[row].item(), GENERATED[row].flatten().tolist()
        real, fake = clean(renoised(row), u, 0.25, 1.5), clean(renoised(row), u, 0.75)
        size = sum(abs(x - r) for x, r in zip(x0, real, strict=True)) / 2
        wanted += [((x - r) - (x - f)) / size for x, r, f in zip(x0, real, fake, strict=True)]
        gaps += [abs(r - f) for r, f in zip(real, fake, strict=True)]
    assert generated.grad.flatten().tolist() == pytest.approx([g / 4 for g in wanted], rel=1e-4)
    assert term.loss.item() == pytest.approx(sum(g**2 for g in wanted) / 4 / 2, rel=1e-4)
    assert term.metrics["score_gap"].item() == pytest.approx(sum(gaps) / 4, rel=1e-5) and term.rows == 2


def test_the_fake_score_learns_the_denoising_of_the_generators_images():
    layer, generated = Layer(), GENERATED.clone().requires_grad_(True)
    term = fake_score_loss(Flow(), layer, generated, None, noise=NOISE, u=U)
    errors = []
    for row in (0, 1):
        (first, second), pairs = renoised(row), zip(NOISE[row].flatten(), GENERATED[row].flatten(), strict=True)
        velocity = [0.5 * first + second, 2 * second]
        errors += [v - (e - x0).item() for v, (e, x0) in zip(velocity, pairs, strict=True)]
    assert term.loss.item() == pytest.approx(sum(error**2 for error in errors) / 4, rel=1e-5)
    term.loss.backward()
    assert generated.grad is None, "the generator learns nothing from it"
    assert layer.to_v.lora_B[ADAPTER].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("renoises", [True, False])
def test_the_simulation_goes_up_to_the_step_of_each_row(renoises):
    """Of two steps (u 1 and 1/2): the first row is at the start, the second has taken one of them."""
    simulation, layer = BackwardSimulation(Flow(renoises), 2), Layer()
    assert simulation.draws == (2 if renoises else 1)
    noise = torch.stack([NOISE, 10 * NOISE.flip(0)], dim=1)[:, : simulation.draws]
    found = simulation.inputs(lambda *given: layer(*given), noise, torch.tensor([0, 1]), Condition())
    assert torch.equal(found[0], NOISE[0])
    start = NOISE[1].flatten().tolist()
    estimate = clean(start, 1.0, 1.0)
    fresh = (10 * NOISE[0]).flatten().tolist() if renoises else start
    wanted = [(x0 + e) / 2 for x0, e in zip(estimate, fresh, strict=True)]
    assert found[1].flatten().tolist() == pytest.approx(wanted, rel=1e-5)


class Condition:
    def select(self, rows):
        return None


def test_every_step_is_picked_as_often():
    picks = BackwardSimulation(Flow(), 3).picks(torch.tensor([0.0, 0.33, 0.34, 0.66, 0.67, 0.999, 1.0]))
    assert picks.tolist() == [0, 0, 1, 1, 2, 2, 2]


# -- how strength and levels move --------------------------------------------------------------------------------------


def test_the_strength_falls_in_a_cosine_and_is_nothing_when_off():
    moving, still = Dynamics(0.8, 8, None, 0.0, 1.0), Dynamics(0.8, None, None, 0.0, 1.0)
    scales = [moving.real_scale(step) for step in (0, 2, 4, 8, 9)]
    assert scales == pytest.approx([0.8, 0.4 * (1 + math.cos(math.pi / 4)), 0.4, 0, 0])
    assert [still.real_scale(step) for step in (0, 4)] == [0, 0]


def test_levels_lean_to_noise_at_first_and_lie_in_their_range():
    draws = (torch.arange(2000) + 0.5) / 2000
    at_first = Dynamics(0.0, None, 10, 0.2, 0.6).levels(draws, 0)
    assert at_first.mean().item() == pytest.approx(0.2 + 0.4 * 4 / 5.5, abs=1e-3), "the mean of Beta(4, 1.5)"
    torch.testing.assert_close(Dynamics(0.0, None, 10, 0.2, 0.6).levels(draws, 10), 0.2 + 0.4 * draws)
    torch.testing.assert_close(Dynamics(0.0, None, None, 0.2, 0.6).levels(draws, 0), 0.2 + 0.4 * draws)


# -- weights of levels -------------------------------------------------------------------------------------------------


class Variance(Flow):
    prediction = "v_prediction"


class Epsilon(Flow):
    prediction = "epsilon"


def test_min_snr_weights_fit_what_the_network_predicts():
    """Signal 3 and spread 1 have snr 9; gamma 4."""
    levels = Levels(torch.tensor([1, 2]), torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))
    cpu = torch.device("cpu")
    assert level_weights(Epsilon(), levels, 4.0, cpu).tolist() == pytest.approx([4 / 9, 1])
    assert level_weights(Variance(), levels, 4.0, cpu).tolist() == pytest.approx([4 / 10, 1 / 2])
    assert level_weights(Epsilon(), levels, None, cpu) is None
