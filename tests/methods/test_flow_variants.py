"""GRPO-Guard, Flow-DPPO and AWM on a real trajectory, against their formulas written out."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from glm_training.algorithms.flow_sde import sde_transition
from glm_training.config import load_config
from glm_training.methods.awm import AWM
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import DiTPolicies, MatchingDraws
from glm_training.models.glm_image.dit import DiTComponent
from glm_training.models.glm_image.tiny import build_tiny

ROOT = Path(__file__).parents[2]
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0])


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def drawn():
    """A component, and a trajectory that it drew before its last layer was moved."""
    pipe = build_tiny()
    dit = DiTComponent(pipe.transformer, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    condition = dit.condition(["a", "b", "c"], torch.zeros(3, 4, dtype=torch.long), (2, 2))
    trajectory = dit.sample(
        rand(3, 4, 8, 8),
        condition,
        dit.schedule(4, 64, 64),
        guidance_scale=1.0,
        kernel="flow",
        eta=0.5,
        sde_indices=(1, 2),
        step_noise=rand(2, 3, 4, 8, 8, seed=1),
        store=True,
        keep_means=True,
    )
    with torch.no_grad():
        weight = dit.transformer.proj_out.weight
        weight.add_(0.02 * rand(*weight.shape, seed=2))
    return dit, trajectory


def transition(dit, trajectory, step):
    """(mean, std, |dt|) of a step under the moved weights, from the kernel's own function."""
    times = trajectory.schedule.timesteps[step].expand(3)
    velocity = dit(trajectory.at(step), times, trajectory.condition)
    sigmas = trajectory.schedule.sigmas
    result = sde_transition(trajectory.at(step), velocity, sigmas[step], sigmas[step + 1], kernel="flow", eta=0.5)
    return result.mean, result.std, float(sigmas[step] - sigmas[step + 1])


def test_the_stored_mean_is_that_of_the_step_that_was_drawn(drawn):
    _, trajectory = drawn
    for column, step in enumerate((1, 2)):
        noise = rand(2, 3, 4, 8, 8, seed=1)[column]
        sigmas = trajectory.schedule.sigmas
        dt = float(sigmas[step] - sigmas[step + 1])
        std = 0.5 * math.sqrt(float(sigmas[step] / (1 - sigmas[step]))) * math.sqrt(dt)
        torch.testing.assert_close(trajectory.at(step + 1), trajectory.mean_at(step) + std * noise)
    with pytest.raises(ValueError, match="step 0 was not kept"):
        trajectory.mean_at(0)


def test_guard_is_the_ratio_of_the_projected_shift_over_dt(drawn):
    dit, trajectory = drawn
    method = FlowPolicyGradient(clip=(1e9, 1e9), kl_coef=0.0, guard=True)
    terms = list(method.losses(DiTPolicies(dit, dit), trajectory, ADVANTAGES))
    for step, term in zip((1, 2), terms, strict=True):
        mean, std, dt = transition(dit, trajectory, step)
        noise = (trajectory.at(step + 1) - trajectory.mean_at(step)) / std
        log_ratio = (noise * (mean - trajectory.mean_at(step))).mean(dim=(1, 2, 3))
        wanted = -(log_ratio.exp() * ADVANTAGES).mean() / dt / 2
        torch.testing.assert_close(term.loss, wanted, rtol=1e-3, atol=1e-5)


def test_divergence_masks_only_what_moves_further_out(drawn):
    dit, trajectory = drawn
    moved, ratios = [], []
    for column, step in enumerate((1, 2)):
        mean, std, _ = transition(dit, trajectory, step)
        moved.append(((mean - trajectory.mean_at(step)) / std).square().mean(dim=(1, 2, 3)) / 2)
        replayed = FlowPolicyGradient((1.0, 1.0), 0.0).replay(dit, trajectory, step).log_prob
        ratios.append((replayed - trajectory.log_probs[:, column]).exp().detach())
    threshold = float(moved[0].detach().sort().values[1]) * 0.999  # one of step 1 stays inside
    method = FlowPolicyGradient(clip=(0.2, 0.2), kl_coef=0.0, divergence_threshold=threshold)
    terms = list(method.losses(DiTPolicies(dit, dit), trajectory, ADVANTAGES))
    dropped = 0
    for divergence, ratio, term in zip(moved, ratios, terms, strict=True):
        outwards = (ADVANTAGES > 0) == (ratio > 1)
        kept = ~(outwards & (divergence > threshold))
        dropped += int((~kept).sum())
        torch.testing.assert_close(term.loss, -(ratio * ADVANTAGES * kept).sum() / 3 / 2, rtol=1e-4, atol=1e-6)
        assert float(term.metrics["clip_fraction"]) == pytest.approx(1 - kept.float().mean().item())
    assert 0 < dropped < 6


def test_flow_dppos_recipe_binds_no_later_than_flow_grpos_clip(tmp_path):
    """At 512 px, D dimensions: a step moved by d of its std has a KL of d^2 / 2 per dimension, and a log-ratio of std
    d / sqrt(D), which is the published clip where d = clip sqrt(D)."""
    said = [f"output_dir={tmp_path}"]
    threshold, clip = (
        load_config([ROOT / "benchmarks/warmth/warmth.yaml", ROOT / f"configs/recipes/{name}.yaml"], said)
        for name in ("flow_dppo", "flow_grpo")
    )
    moved = clip.policy_for("dit").clip_high * math.sqrt(16 * 64 * 64)
    assert threshold.reward.grpo.dit.divergence_threshold <= moved**2 / 2


def draws(levels=(1, 3)) -> MatchingDraws:
    return MatchingDraws(levels, lambda level: rand(3, 4, 8, 8, seed=10 + level))


def test_awm_is_the_ratio_of_matching_errors(drawn):
    dit, trajectory = drawn
    method = AWM(clip=(0.2, 0.2), kl_coef=0.0)
    old = method.densities(dit, trajectory, draws()) + torch.tensor([0.05, -0.1])
    terms = list(method.losses(DiTPolicies(dit, dit), trajectory, ADVANTAGES, draws(), old))
    for column, (level, term) in enumerate(zip((1, 3), terms, strict=True)):
        sigma, noise = trajectory.schedule.sigmas[level], rand(3, 4, 8, 8, seed=10 + level)
        noisy = (1 - sigma) * trajectory.final + sigma * noise
        velocity = dit(noisy, trajectory.schedule.timesteps[level].expand(3), trajectory.condition)
        density = -(velocity - (noise - trajectory.final)).square().mean(dim=(1, 2, 3))
        ratio = (density - old[:, column]).exp()
        clipped = torch.minimum(ratio * ADVANTAGES, ratio.clamp(0.8, 1.2) * ADVANTAGES)
        torch.testing.assert_close(term.loss, -clipped.mean() / 2)


def test_awm_without_old_densities_has_the_gradient_of_the_weighted_error(drawn):
    dit, trajectory = drawn
    weight = dit.transformer.proj_out.weight
    loss = sum(
        term.loss for term in AWM((0.2, 0.2), 0.0).losses(DiTPolicies(dit, dit), trajectory, ADVANTAGES, draws((2,)))
    )
    gradient = torch.autograd.grad(loss, weight)[0]
    noisy, times, noise, _ = draws((2,)).inputs(trajectory, 2)
    error = (dit(noisy, times, trajectory.condition) - (noise - trajectory.final)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(gradient, torch.autograd.grad((ADVANTAGES * error).mean(), weight)[0])


def test_awm_kl_is_the_squared_velocity_shift(drawn):
    dit, trajectory = drawn
    weight = dit.transformer.proj_out.weight

    @contextmanager
    def reference():
        before = weight.data
        weight.data = before * 1.5
        yield
        weight.data = before

    plain = list(AWM((0.2, 0.2), 0.0).losses(DiTPolicies(dit, dit), trajectory, ADVANTAGES, draws((2,))))
    kept = list(AWM((0.2, 0.2), 0.5).losses(DiTPolicies(dit, dit, reference), trajectory, ADVANTAGES, draws((2,))))
    noisy, times, _, _ = draws((2,)).inputs(trajectory, 2)
    with torch.no_grad():
        now = dit(noisy, times, trajectory.condition)
        with reference():
            anchor = dit(noisy, times, trajectory.condition)
    kl = (now - anchor).square().mean()
    torch.testing.assert_close(kept[0].loss - plain[0].loss, 0.5 * kl)
    torch.testing.assert_close(kept[0].metrics["kl"], kl)
