"""Policy gradients of both halves on fabricated rollouts, against their formulas with numbers put in."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.methods.awm import AWM
from glm_training.methods.flow_policy_gradient import FlowPolicyGradient
from glm_training.methods.losses import DiTPolicies, MatchingDraws
from glm_training.models.glm_image.ar_types import ARRollout
from tests.methods.toys import ToyVelocity, prompt_of, trajectory_of

ADVANTAGES = [2.0, -1.0]

# -- the AR half -------------------------------------------------------------------------------------------------------

SHIFT = [[0.5, -0.1, 0.0, 0.3, -0.4, 0.1], [0.2, -0.5, 0.05, -0.05, 0.0, 0.6]]
"""New minus old log-prob; with a clip of (0.2, 0.3) some ratios are outside on either side."""
OLD = torch.tensor([[-1.0, -2.0, -0.5, -1.5, -1.0, -3.0]] * 2)


def tokens_of(log_probs: torch.Tensor = OLD) -> ARRollout:
    return ARRollout(prompt_of(2), torch.zeros(2, 6, dtype=torch.long), log_probs, None, 0.9)


def ar_term(method: ARPolicyGradient, reference=None, entropy=None, **options):
    new = (OLD + torch.tensor(SHIFT)).requires_grad_(True)
    seen = []

    def policy(prompt, tokens, **scoring):
        seen.append(scoring)
        return new if not scoring.get("entropy") else torch.stack([new, entropy])

    (term,) = method.losses(policy, tokens_of(), torch.tensor(ADVANTAGES), reference, **options)
    assert seen[0]["temperature"] == 0.9
    return term, new


def surrogate(row: int, shift: float) -> float:
    ratio = math.exp(shift)
    return -min(ratio * ADVANTAGES[row], min(max(ratio, 0.8), 1.3) * ADVANTAGES[row])


def test_clipped_ratios_are_averaged_over_tokens_then_rows():
    term, new = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.0))
    wanted = [[surrogate(row, shift) for shift in shifts] for row, shifts in enumerate(SHIFT)]
    assert term.loss.item() == pytest.approx(sum(map(sum, wanted)) / 12, rel=1e-6)
    assert term.rows == 2 and "kl" not in term.metrics
    assert term.metrics["ratio_deviation_max"].item() == pytest.approx(math.exp(0.6) - 1, rel=1e-6)
    term.loss.backward()
    # where the clip holds no gradient comes back; elsewhere it is -A r / 12
    free = [[shift < math.log(1.3) for shift in SHIFT[0]], [shift > math.log(0.8) for shift in SHIFT[1]]]
    gradient = [
        [-ADVANTAGES[row] * math.exp(shift) / 12 * free[row][i] for i, shift in enumerate(shifts)]
        for row, shifts in enumerate(SHIFT)
    ]
    torch.testing.assert_close(new.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-7)


def test_the_kl_is_k3_beside_the_policy_loss():
    """At ratio 1 the policy's loss is -mean A; exp(d) - d - 1 with d = reference - log-prob."""
    reference = OLD + torch.tensor(SHIFT) + 0.5
    term, _ = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.4), reference)
    plain, _ = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.0))
    kl = math.exp(0.5) - 0.5 - 1
    assert term.metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert (term.loss - plain.loss).item() == pytest.approx(0.4 * kl, rel=1e-4)


def test_one_ratio_per_sequence_is_that_of_its_mean():
    term, _ = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.0, level="sequence"))
    wanted = [surrogate(row, sum(shifts) / 6) for row, shifts in enumerate(SHIFT)]
    assert term.loss.item() == pytest.approx(sum(wanted) / 2, rel=1e-6)


def test_a_larger_entropy_lowers_the_loss():
    entropy = torch.tensor([[1.0] * 6, [3.0] * 6])
    plain, _ = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.0))
    term, _ = ar_term(ARPolicyGradient(clip=(0.2, 0.3), kl_coef=0.0, entropy_coef=0.25), entropy=entropy)
    assert term.metrics["entropy"] == 2
    assert (term.loss - plain.loss).item() == pytest.approx(-0.25 * 2, rel=1e-5)


def test_preview_tokens_come_first():
    method = ARPolicyGradient((0.2, 0.3), 0.0, preview_weight=3.0, large_weight=0.5)
    wanted = [[surrogate(row, shift) for shift in shifts] for row, shifts in enumerate(SHIFT)]
    weights = [3.0, 3.0, 0.5, 0.5, 0.5, 0.5]
    rows = [sum(w * x for w, x in zip(weights, row, strict=True)) / sum(weights) for row in wanted]
    assert ar_term(method)[0].loss.item() == pytest.approx(sum(rows) / 2, rel=1e-6)


def test_a_replay_is_compared_without_sign():
    new = OLD + torch.tensor(SHIFT)
    deviation = ARPolicyGradient((0.2, 0.3), 0.0).deviation(lambda *_, **__: new.requires_grad_(True), tokens_of())
    torch.testing.assert_close(deviation, torch.tensor(SHIFT).abs())
    assert not deviation.requires_grad


def test_on_the_policy_that_drew_every_ratio_is_1_however_the_drawing_was_rounded():
    """The loss is -mean A, the gradient -A / 12 at every token; how far the recorded numbers are off is told."""
    term, new = ar_term(ARPolicyGradient(clip=(1e-5, 1e-5), kl_coef=0.0), on_policy=True)
    assert term.loss.item() == pytest.approx(-sum(ADVANTAGES) / 2)
    assert term.metrics["clip_fraction"] == 0 and term.metrics["ratio_deviation_max"] == 0
    shifts = [abs(shift) for row in SHIFT for shift in row]
    assert term.metrics["replay_gap"].item() == pytest.approx(sum(shifts) / 12)
    assert term.metrics["replay_gap_max"].item() == pytest.approx(max(shifts))
    term.loss.backward()
    torch.testing.assert_close(new.grad, torch.tensor([[-a / 12] * 6 for a in ADVANTAGES]), rtol=1e-6, atol=0.0)


# -- the DiT half ------------------------------------------------------------------------------------------------------

BEFORE = [[1.0, -0.5], [0.25, 2.0]]  # at sigma 1
BETWEEN = [[0.5, 0.1], [-0.25, 1.0]]  # at sigma 0.8
AFTER = [[0.2, -0.1], [0.0, 0.75]]  # at sigma 0.5
FINAL = [[0.0, 0.0], [0.1, 0.5]]
NEW, REFERENCE = 0.7, 0.4


def mean_and_std(step: int, row: int, weight: float) -> tuple[list[float], float]:
    """The flow kernel with eta 0.5: s = eta sqrt(sigma / (1 - sigma)), at sigma 1 with the next level in the root."""
    sigma, after, latents = ((1.0, 0.8, BEFORE), (0.8, 0.5, BETWEEN))[step]
    s2 = 0.25 * sigma / (1 - 0.8 if step == 0 else 1 - sigma)
    dt = after - sigma
    velocity = [weight * x + (0.9, 0.6)[step] for x in latents[row]]
    mean = [
        x * (1 + s2 * dt / (2 * sigma)) + v * (1 + s2 * (1 - sigma) / (2 * sigma)) * dt
        for x, v in zip(latents[row], velocity, strict=True)
    ]
    return mean, math.sqrt(s2 * -dt)


def log_prob(step: int, row: int, weight: float) -> float:
    mean, std = mean_and_std(step, row, weight)
    taken = (BETWEEN, AFTER)[step][row]
    squares = [((x - m) / std) ** 2 for x, m in zip(taken, mean, strict=True)]
    return sum(-square / 2 - math.log(std) - math.log(2 * math.pi) / 2 for square in squares) / 2


def drawn(old: float):
    """A trajectory whose two noisy steps were drawn at weight `old`."""
    stored = torch.tensor([BEFORE, BETWEEN, AFTER]).transpose(0, 1).reshape(2, 3, 1, 1, 2)
    log_probs = torch.tensor([[log_prob(step, row, old) for step in (0, 1)] for row in (0, 1)])
    return trajectory_of(
        torch.tensor(FINAL).view(2, 1, 1, 2),
        guidance_scale=2.5,
        sde_indices=(0, 1),
        log_probs=log_probs,
        stored=stored,
        stored_steps=(0, 1, 2),
    )


def flow_terms(policy: ToyVelocity, old: float, clip: tuple[float, float], kl_coef: float = 0.0, **options):
    policies = DiTPolicies(policy, policy, partial(policy.at, REFERENCE))
    kept = {name: options.pop(name) for name in ("noise_weighting", "kl_form") if name in options}
    method = FlowPolicyGradient(clip, kl_coef, **kept)
    return list(method.losses(policies, drawn(old), torch.tensor(ADVANTAGES), **options))


@pytest.mark.parametrize("clip", [(0.9, 9.0), (0.01, 0.02)])
def test_each_noisy_step_is_a_clipped_ratio_and_all_are_averaged(clip):
    policy = ToyVelocity(NEW)
    for step, term in enumerate(flow_terms(policy, 0.6, clip)):
        losses = []
        for row, advantage in enumerate(ADVANTAGES):
            ratio = math.exp(log_prob(step, row, NEW) - log_prob(step, row, 0.6))
            losses.append(-min(ratio * advantage, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage))
        assert term.loss.item() == pytest.approx(sum(losses) / 2 / 2, rel=1e-4), step
        assert term.rows == 2 and "kl" not in term.metrics
    assert [call["times"].tolist() for call in policy.calls] == [[900, 900], [600, 600]]
    assert {call["guidance"] for call in policy.calls} == {2.5}


def test_the_flow_kl_is_that_of_the_two_gaussians():
    plain, kept = (flow_terms(ToyVelocity(NEW), NEW, (0.9, 9.0), kl_coef) for kl_coef in (0.0, 0.3))
    for step in (0, 1):
        distances = []
        for row in (0, 1):
            (now, std), (anchor, _) = mean_and_std(step, row, NEW), mean_and_std(step, row, REFERENCE)
            distances += [((a - b) / std) ** 2 / 2 for a, b in zip(now, anchor, strict=True)]
        kl = sum(distances) / 4
        assert kept[step].metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
        assert (kept[step].loss - plain[step].loss).item() == pytest.approx(0.3 * kl / 2, rel=1e-4)
        assert plain[step].loss.item() == pytest.approx(-0.5 / 2, rel=1e-5), "at ratio 1 it is -mean A"


def test_noise_weights_multiply_the_policy_loss_of_a_step_and_not_its_kl():
    """Over the mean std of the whole schedule, of which the third step is not trained."""
    plain, kept, alone = (
        flow_terms(ToyVelocity(NEW), 0.6, (0.9, 9.0), kl_coef, noise_weighting=weighted)
        for kl_coef, weighted in ((0.0, False), (0.3, True), (0.3, False))
    )
    stds = [mean_and_std(0, 0, NEW)[1], mean_and_std(1, 0, NEW)[1], math.sqrt(0.25 * 0.5 / 0.5 * 0.5)]
    for step in (0, 1):
        weight = stds[step] / (sum(stds) / 3)
        assert abs(weight - 1) > 0.05
        kl = (alone[step].loss - plain[step].loss).item()
        assert kept[step].loss.item() == pytest.approx(weight * plain[step].loss.item() + kl, rel=1e-4)


def test_the_velocity_form_of_the_kl_is_the_squared_velocity_difference():
    plain, kept = (flow_terms(ToyVelocity(NEW), NEW, (0.9, 9.0), kl_coef, kl_form="velocity") for kl_coef in (0.0, 0.3))
    for step, latents in enumerate((BEFORE, BETWEEN)):
        kl = sum(((NEW - REFERENCE) * x) ** 2 for row in latents for x in row) / 4
        assert kept[step].metrics["kl"].item() == pytest.approx(kl, rel=1e-5)
        assert (kept[step].loss - plain[step].loss).item() == pytest.approx(0.3 * kl / 2, rel=1e-4)


def test_the_velocity_kl_pulls_towards_the_reference():
    """Its gradient in the weight is 2 (weight - reference) mean x^2."""
    policy, plain = ToyVelocity(NEW), ToyVelocity(NEW)
    kept = flow_terms(policy, NEW, (0.9, 9.0), 0.3, kl_form="velocity")[0]
    without = flow_terms(plain, NEW, (0.9, 9.0), 0.0)[0]
    pull = (
        torch.autograd.grad(kept.loss, policy.weight)[0] - torch.autograd.grad(without.loss, plain.weight)[0]
    ).item()
    squares = sum(x**2 for row in BEFORE for x in row) / 4
    assert pull == pytest.approx(0.3 * 2 * (NEW - REFERENCE) * squares / 2, rel=1e-3)


def test_the_deviation_of_a_replay_is_that_of_its_ratio():
    policy = ToyVelocity(NEW)
    for step in (0, 1):
        found = FlowPolicyGradient((0.1, 0.1), 0.0).deviation(policy, drawn(0.6), step)
        wanted = [abs(math.exp(log_prob(step, row, NEW) - log_prob(step, row, 0.6)) - 1) for row in (0, 1)]
        assert found.tolist() == pytest.approx(wanted, rel=1e-3) and not found.requires_grad


def test_noisy_steps_of_the_policy_that_drew_have_ratio_1_whatever_was_recorded():
    """As without clip and with numbers that fit: -mean A per step, and its gradient is not clipped away."""
    policy, wanted = ToyVelocity(NEW), ToyVelocity(NEW)
    found = flow_terms(policy, 0.6, (1e-5, 1e-5), on_policy=True)
    unclipped = flow_terms(wanted, NEW, (0.9, 9.0))
    for step, (term, plain) in enumerate(zip(found, unclipped, strict=True)):
        assert term.loss.item() == pytest.approx(-sum(ADVANTAGES) / 2 / 2)
        assert term.metrics["clip_fraction"] == 0 and term.metrics["ratio_deviation_max"] == 0
        gaps = [abs(log_prob(step, row, NEW) - log_prob(step, row, 0.6)) for row in (0, 1)]
        assert term.metrics["replay_gap"].item() == pytest.approx(sum(gaps) / 2, rel=1e-3)
        assert term.metrics["replay_gap_max"].item() == pytest.approx(max(gaps), rel=1e-3)
        (term.loss + 0).backward()
        (plain.loss + 0).backward()
    assert abs(wanted.weight.grad.item()) > 0.01
    assert policy.weight.grad.item() == pytest.approx(wanted.weight.grad.item(), rel=1e-4)


def test_a_rescored_rollout_has_the_log_probs_and_means_of_the_present_weights():
    policy = ToyVelocity(NEW)
    trajectory = replace(drawn(0.6), means=torch.zeros(2, 2, 1, 1, 2))
    log_probs, means = FlowPolicyGradient((0.1, 0.1), 0.0).rescored(policy, trajectory)
    for step in (0, 1):
        for row in (0, 1):
            assert log_probs[row, step].item() == pytest.approx(log_prob(step, row, NEW), rel=1e-4)
            assert means[row, step].flatten().tolist() == pytest.approx(mean_and_std(step, row, NEW)[0], rel=1e-4)
    assert not log_probs.requires_grad
    assert FlowPolicyGradient((0.1, 0.1), 0.0).rescored(policy, drawn(0.6))[1] is None


# -- matching in the likelihood's place --------------------------------------------------------------------------------

NOISES = {1: [[0.5, 1.0], [-1.0, 2.0]], 0: [[1.5, -1.0], [0.0, 0.25]]}
LEVELS = {1: (0.8, 0.6), 0: (1.0, 0.9)}


def density(level: int, row: int, weight: float, huber: float | None = None) -> float:
    """Minus the mean of e^2, or of 2 c (sqrt(e^2 + c^2) - c), e being velocity - (noise - image)."""
    (sigma, time), total = LEVELS[level], 0.0
    for x0, e in zip(FINAL[row], NOISES[level][row], strict=True):
        error = weight * ((1 - sigma) * x0 + sigma * e) + time - (e - x0)
        total += error**2 if huber is None else 2 * huber * (math.sqrt(error**2 + huber**2) - huber)
    return -total / 2


def matching_terms(method: AWM, old: torch.Tensor | None, policy: ToyVelocity):
    draws = MatchingDraws((1, 0), lambda level: torch.tensor(NOISES[level]).view(2, 1, 1, 2))
    trajectory = trajectory_of(torch.tensor(FINAL).view(2, 1, 1, 2), guidance_scale=2.5)
    policies = DiTPolicies(policy, policy, partial(policy.at, REFERENCE))
    return list(method.losses(policies, trajectory, torch.tensor(ADVANTAGES), draws, old))


@pytest.mark.parametrize("huber", [None, 0.5])
@pytest.mark.parametrize("clip", [(0.9, 9.0), (0.01, 0.02)])
def test_awm_is_a_clipped_ratio_of_matching_errors(clip, huber):
    old = torch.tensor([[density(level, row, 0.6, huber) for level in (1, 0)] for row in (0, 1)])
    policy = ToyVelocity(NEW)
    for level, term in zip((1, 0), matching_terms(AWM(clip, 0.0, huber), old, policy), strict=True):
        losses = []
        for row, advantage in enumerate(ADVANTAGES):
            ratio = math.exp(density(level, row, NEW, huber) - density(level, row, 0.6, huber))
            losses.append(-min(ratio * advantage, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage))
        assert term.loss.item() == pytest.approx(sum(losses) / 2 / 2, rel=1e-4)
        assert term.rows == 2 and "kl" not in term.metrics
    assert {call["guidance"] for call in policy.calls} == {2.5}


def test_the_kl_of_awm_is_the_squared_distance_of_velocities():
    plain, kept = (matching_terms(AWM((0.9, 9.0), kl_coef), None, ToyVelocity(NEW)) for kl_coef in (0.0, 0.3))
    for level, without, term in zip((1, 0), plain, kept, strict=True):
        sigma = LEVELS[level][0]
        points = [(1 - sigma) * FINAL[row][i] + sigma * NOISES[level][row][i] for row in (0, 1) for i in (0, 1)]
        kl = sum(((NEW - REFERENCE) * x) ** 2 for x in points) / 4
        assert term.metrics["kl"].item() == pytest.approx(kl, rel=1e-4)
        assert (term.loss - without.loss).item() == pytest.approx(0.3 * kl / 2, rel=1e-3)
        assert without.loss.item() == pytest.approx(-0.25, rel=1e-5), "at ratio 1 it is -mean A, over two levels"
