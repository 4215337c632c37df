"""Distribution matching on a 2-D teacher, and what its pieces hand to the networks."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from glm_training.methods.distillation import BackwardSimulation, Dynamics, Scores, fake_score_loss, generator_loss
from glm_training.models.denoising import Denoiser, Levels, Network
from glm_training.models.lora import adapter_parameters, adapters_scaled, add_lora
from glm_training.utils.randomness import normal, uniform


class Flow(Denoiser):
    """Velocity of a straight path, on points in the plane."""

    prediction = "velocity"

    def __init__(self, renoises: bool = False) -> None:
        self.renoises = renoises

    def levels(self, u: Tensor) -> Levels:
        return Levels(u, 1 - u, u)

    def sampling_levels(self, steps: int) -> Levels:
        return self.levels(torch.arange(steps, 0, -1) / steps)

    def predict(self, network: Network, noisy, levels, condition, *, guidance_scale=1.0):
        return network(noisy, levels.timestep.to(noisy.device))


@dataclass(frozen=True)
class Rows:
    """A condition that knows which rows it stands for."""

    rows: Tensor

    def select(self, rows: Tensor) -> Rows:
        return Rows(self.rows[rows])


class MLP(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2 + 9, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = torch.stack([f(k * math.pi * t) for k in (0.5, 1, 2, 4) for f in (torch.sin, torch.cos)], dim=1)
        x = torch.cat([x, t[:, None], waves], dim=1)
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x))
        return self.out(x)


def mixture(generator: torch.Generator, count: int) -> Tensor:
    """Four blobs around (1, -1), unevenly filled."""
    centres = torch.tensor([[3.0, 0.0], [-1.0, 1.0], [1.0, -3.0], [1.0, -1.0]])
    which = torch.multinomial(torch.tensor([0.4, 0.3, 0.2, 0.1]), count, replacement=True, generator=generator)
    return centres[which] + 0.25 * torch.randn(count, 2, generator=generator)


@pytest.fixture(scope="module")
def teacher() -> MLP:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP()
    denoiser, optimizer = Flow(), torch.optim.Adam(network.parameters(), lr=2e-3)
    steps = 1500
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        clean = mixture(generator, 512)
        noise, levels = torch.randn(512, 2, generator=generator), denoiser.levels(torch.rand(512, generator=generator))
        error = network(denoiser.noised(clean, noise, levels), levels.timestep) - denoiser.target(clean, noise, levels)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return network.requires_grad_(False)


@torch.no_grad()
def sampled(network: nn.Module, steps: int, seed: int, count: int = 2000) -> Tensor:
    denoiser, generator = Flow(), torch.Generator().manual_seed(seed)
    simulation = BackwardSimulation(denoiser, steps)
    last = torch.full((count,), steps - 1)
    noise = torch.randn(count, 1, 2, generator=generator)
    inputs = simulation.inputs(network, noise, last, Rows(torch.arange(count)))
    return simulation.generate(network, inputs, last, None)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without bias."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - within[0] - within[1])


def distil(teacher: MLP, steps: int, updates: int, ratio: int = 5, batch: int = 256) -> MLP:
    """A generator of `steps` steps, trained as the trainer does it."""
    denoiser, student, guidance = Flow(), deepcopy(teacher).requires_grad_(True), deepcopy(teacher)
    add_lora(guidance, ["layers.0", "layers.1", "layers.2", "out"], rank=32, alpha=32.0)
    simulation = BackwardSimulation(denoiser, steps)
    scores = Scores(denoiser, guidance, guidance, fake_scale=1.0, guidance_scale=1.0)
    dynamics = Dynamics(0.25, updates // 3, updates // 3, 0.02, 0.98)
    generator_optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.0, 0.99))
    guidance_optimizer = torch.optim.Adam(adapter_parameters(guidance).values(), lr=2e-3, betas=(0.0, 0.99))
    for step in range(updates):
        for optimizer in (generator_optimizer, guidance_optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= 0.998
        names = [(step, row) for row in range(batch)]
        noise, draws = normal(0, "noise", names, (3, 2)), uniform(0, "levels", names, (3,))
        condition, due = Rows(torch.arange(batch)), (step + 1) % ratio == 0
        picks = simulation.picks(draws[:, 0])
        inputs = simulation.inputs(student, noise[:, :1], picks, condition)
        with torch.set_grad_enabled(due):
            generated = simulation.generate(student, inputs, picks, condition)
        if due:
            loss = generator_loss(
                scores, generated, condition, noise=noise[:, 1], u=dynamics.levels(draws[:, 1], step),
                real_scale=dynamics.real_scale(step),
            ).loss  # fmt: skip
            generator_optimizer.zero_grad()
            loss.backward()
        with adapters_scaled(guidance, 1.0):
            u = dynamics.levels(draws[:, 2], step)
            loss = fake_score_loss(denoiser, guidance, generated, condition, noise=noise[:, 2], u=u).loss
            guidance_optimizer.zero_grad()
            loss.backward()
        guidance_optimizer.step()
        if due:
            generator_optimizer.step()
    return student


@pytest.mark.parametrize("steps", [1, 2])
def test_the_student_comes_five_times_closer_to_the_teacher(teacher, steps):
    wanted = sampled(teacher, 100, seed=1)
    before = energy_distance(sampled(teacher, steps, seed=2), wanted)
    after = energy_distance(sampled(distil(teacher, steps, updates=400), steps, seed=2), wanted)
    assert before > 5 * after


def test_the_simulation_is_the_sampler_up_to_the_step_of_each_row(teacher):
    """Rows at step 0 get the noise itself; a row's input does not depend on the rows beside it."""
    for renoises in (False, True):
        denoiser = Flow(renoises)
        simulation = BackwardSimulation(denoiser, 3)
        assert simulation.draws == (3 if renoises else 1)
        noise = normal(0, "noise", [(row,) for row in range(6)], (simulation.draws, 2))
        picks = torch.tensor([2, 0, 1, 2, 1, 0])
        calls = []

        def network(x, t, calls=calls):
            calls.append((len(x), sorted(set(t.tolist()), reverse=True)))
            return teacher(x, t)

        inputs = simulation.inputs(network, noise, picks, Rows(torch.arange(6)))
        assert calls == [(4, [1.0]), (2, [pytest.approx(2 / 3)])], "a row goes through what lies before it, no more"
        assert torch.equal(inputs[picks == 0], noise[picks == 0, 0])
        for row in range(6):
            x = noise[row : row + 1, 0]
            for step in range(int(picks[row])):
                sigma, after = 1 - step / 3, 1 - (step + 1) / 3
                clean = x - sigma * teacher(x, torch.tensor([sigma]))
                fresh = noise[row : row + 1, step + 1] if renoises else (x - (1 - sigma) * clean) / sigma
                x = (1 - after) * clean + after * fresh
            torch.testing.assert_close(inputs[row : row + 1], x, atol=1e-5, rtol=1e-5)


def test_picks_are_uniform_over_the_steps():
    simulation = BackwardSimulation(Flow(), 4)
    draws = torch.cat([torch.arange(1000) / 1000, torch.tensor([1 - 2**-24])])
    assert simulation.picks(draws).bincount().tolist() == [250, 250, 250, 251]


def test_the_generator_loss_moves_the_generator_alone_and_towards_the_teacher(teacher):
    """And the fake-score loss moves the adapter alone."""
    guidance = deepcopy(teacher)
    add_lora(guidance, ["layers.1"], rank=4, alpha=4.0)
    scores = Scores(Flow(), guidance, guidance, fake_scale=1.0, guidance_scale=1.0)
    for name, param in adapter_parameters(guidance).items():
        with torch.no_grad():
            param.copy_(normal(1, name, [(0,)], tuple(param.shape))[0] / 4)
    generated = normal(0, "x0", [(row,) for row in range(8)], (2,)).requires_grad_(True)
    noise, u = normal(0, "noise", [(row,) for row in range(8)], (2,)), torch.linspace(0.1, 0.9, 8)
    term = generator_loss(scores, generated, None, noise=noise, u=u, real_scale=0.0)
    term.loss.backward()
    levels = Flow().levels(u)
    noisy = Flow().noised(generated.detach(), noise, levels)
    real, fake = scores.real(noisy, levels, None, 0.0), scores.fake(noisy, levels, None)
    assert torch.equal(real, Flow().clean(teacher(noisy, u), noisy, levels)) and not torch.equal(real, fake)
    assert ((generated.grad * (fake - real)).sum(1) > 0).all(), "a descent step leads from the fake x0 to the real one"
    assert all(param.grad is None for param in guidance.parameters())
    with adapters_scaled(guidance, 1.0):
        fake_score_loss(Flow(), guidance, generated * 2, None, noise=noise, u=u).loss.backward()
    assert all(param.grad is not None for param in adapter_parameters(guidance).values())
    assert sum(param.grad is not None for param in guidance.parameters()) == 2


def test_equal_scores_leave_the_generator_where_it_is(teacher):
    """The adapter at full strength on both sides: nothing tells the distributions apart."""
    guidance = deepcopy(teacher)
    add_lora(guidance, ["layers.1"], rank=4, alpha=4.0)
    scores = Scores(Flow(), guidance, guidance, fake_scale=1.0, guidance_scale=1.0)
    generated = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    term = generator_loss(scores, generated, None, noise=torch.ones(4, 2), u=torch.full((4,), 0.5), real_scale=1.0)
    term.loss.backward()
    assert float(term.metrics["score_gap"]) == 0 and not generated.grad.any()


def test_beta_quantiles_move_from_high_noise_to_uniform():
    dynamics = Dynamics(0.25, 100, 100, 0.2, 0.6)
    draws = (torch.arange(4000) + 0.5) / 4000
    means = [float((dynamics.levels(draws, step).mean() - 0.2) / 0.4) for step in (0, 50, 100)]
    assert means == pytest.approx([4 / 5.5, 2.5 / 3.75, 0.5], abs=1e-3)
    for step in (0, 50, 100):
        levels = dynamics.levels(draws, step)
        assert 0.2 <= levels.min() and levels.max() <= 0.6
        assert torch.equal(levels.argsort(), draws.argsort()), "a quantile keeps the order of the draws"
    assert [dynamics.real_scale(step) for step in (0, 50, 100, 101)] == pytest.approx([0.25, 0.125, 0, 0])
