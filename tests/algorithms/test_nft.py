"""DiffusionNFT: the two branches, the direction of the gradient, and the old policy's decay."""

import math

import pytest
import torch

from glm_training.algorithms.flow_matching import interpolate, velocity_target
from glm_training.algorithms.nft import nft_loss, old_policy_decay

NAN = math.nan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A batch of noised samples with a current, an old and a target velocity."""

    def __init__(self, seed: int, *shape: int) -> None:
        self.clean, noise = draw(seed, *shape), draw(seed + 1, *shape)
        self.sigma = torch.linspace(0.2, 0.9, shape[0])
        self.level = self.sigma.reshape(-1, *[1] * (len(shape) - 1))
        self.noisy = interpolate(self.clean, noise, self.sigma)
        self.target = velocity_target(self.clean, noise)
        self.velocity, self.old = draw(seed + 2, *shape), draw(seed + 3, *shape)
        self.advantages = draw(seed + 4, shape[0])

    def loss(self, velocity: torch.Tensor | None = None, advantages: torch.Tensor | None = None, **options):
        options = {"beta": 0.5, "advantage_max": 5.0} | options
        return nft_loss(
            self.velocity if velocity is None else velocity,
            self.old,
            self.noisy,
            self.clean,
            self.sigma,
            self.advantages if advantages is None else advantages,
            **options,
        )

    def gradient(self, velocity: torch.Tensor, advantages: torch.Tensor | None = None, **options) -> torch.Tensor:
        leaf = velocity.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(leaf, advantages, **options).loss, leaf)
        return slope

    def branch(self, velocity: torch.Tensor) -> torch.Tensor:
        error = self.noisy - self.level * velocity - self.clean
        return error.square().flatten(1).mean(1) / error.abs().flatten(1).mean(1)


def test_by_hand() -> None:
    # v+ = 0.5*2 + 0.5*1 = 1.5, v- = 1.5*1 - 0.5*2 = 0.5; x0+ = 3 - 0.5*1.5 = 2.25, x0- = 2.75; errors 1.25 and 1.75
    # l = e^2/|e| = |e|; r = 1/(2*5) + 1/2 = 0.6; loss = 5 * (0.6*1.25 + 0.4*1.75) / 0.5
    result = nft_loss(
        torch.tensor([[2.0]]),
        torch.tensor([[1.0]]),
        torch.tensor([[3.0]]),
        torch.tensor([[1.0]]),
        0.5,
        torch.tensor([1.0]),
        beta=0.5,
        advantage_max=5.0,
        reference_velocity=torch.tensor([[-1.0]]),
        kl_coef=0.1,
    )
    assert result.loss.item() == pytest.approx(14.5 + 0.1 * 9)
    assert result.positive_loss.item() == pytest.approx(1.25)
    assert result.negative_loss.item() == pytest.approx(1.75)
    assert result.kl is not None and result.kl.item() == pytest.approx(9.0)
    assert result.old_deviation.item() == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(2, 3), (4, 2, 3, 5)])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("advantage_max", [1.0, 5.0])
def test_loss_is_the_published_mixture(shape: tuple[int, ...], beta: float, advantage_max: float) -> None:
    case = Case(0, *shape)
    share = (case.advantages / (2 * advantage_max) + 0.5).clamp(0, 1)
    positive = case.branch(beta * case.velocity + (1 - beta) * case.old)
    negative = case.branch((1 + beta) * case.old - beta * case.velocity)
    expected = advantage_max * (share * positive + (1 - share) * negative).mean() / beta
    result = case.loss(beta=beta, advantage_max=advantage_max)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.positive_loss, positive.mean())
    torch.testing.assert_close(result.negative_loss, negative.mean())
    assert result.kl is None


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_full_advantage_uses_one_branch_only(factor: float) -> None:
    case = Case(1, 3, 4)
    best = torch.full((3,), 2.0 * factor)  # advantages beyond advantage_max are clipped to it
    positive = case.branch(0.5 * (case.velocity + case.old)).mean()
    negative = case.branch(1.5 * case.old - 0.5 * case.velocity).mean()
    torch.testing.assert_close(case.loss(advantages=best, advantage_max=2.0).loss, 2.0 / 0.5 * positive)
    torch.testing.assert_close(case.loss(advantages=-best, advantage_max=2.0).loss, 2.0 / 0.5 * negative)


def test_branches_are_equal_at_the_old_policy() -> None:
    case = Case(2, 3, 4, 5)
    result = case.loss(case.old)
    assert torch.equal(result.positive_loss, result.negative_loss) and result.old_deviation.item() == 0
    torch.testing.assert_close(result.loss, 5.0 / 0.5 * case.branch(case.old).mean(), msg="whatever the advantages")


def test_mirroring_velocity_and_advantage_changes_nothing() -> None:
    case = Case(3, 4, 6)
    mirrored = 2 * case.old - case.velocity
    result, mirror = case.loss(), case.loss(mirrored, -case.advantages)
    torch.testing.assert_close(mirror.loss, result.loss)
    torch.testing.assert_close(mirror.positive_loss, result.negative_loss)


@pytest.mark.parametrize("beta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("advantage_max", [3.0, 5.0])
def test_gradient_at_the_old_policy_is_proportional_to_the_advantage(beta: float, advantage_max: float) -> None:
    case = Case(4, 5, 3, 4)
    error = case.noisy - case.level * case.old - case.clean
    size = error.abs().flatten(1).mean(1).reshape(5, 1, 1)
    advantages = case.advantages.reshape(5, 1, 1)
    expected = -2 * case.level * advantages * error / (size * case.clean[0].numel() * 5)
    slope = case.gradient(case.old, beta=beta, advantage_max=advantage_max)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-7)


def test_a_step_moves_good_samples_to_their_target_and_bad_ones_away() -> None:
    case = Case(5, 6, 8)
    advantages = torch.tensor([1.0, -1.0, 3.0, -3.0, 0.0, 9.0])
    moved = case.old - 1e-2 * case.gradient(case.old, advantages)

    def distance(velocity: torch.Tensor) -> torch.Tensor:
        return (velocity - case.target).square().sum(1)

    closer = distance(case.old) - distance(moved)
    assert torch.equal(closer.sign(), advantages.sign())
    assert closer[2] / closer[0] > 1.5 and closer[5] > 0


def test_descending_on_good_samples_reaches_the_target_beyond_the_old_policy() -> None:
    # at r = 1 the minimum is v+ = target, that is v = old + (target - old) / beta
    case = Case(6, 2, 4)
    best = torch.full((2,), 5.0)
    at_minimum = case.old + (case.target - case.old) / 0.5
    torch.testing.assert_close(case.gradient(at_minimum, best), torch.zeros(2, 4), atol=1e-2, rtol=0)
    assert case.loss(at_minimum, best).loss < 1e-3 < case.loss(case.old, best).loss


def test_sigma_forms_agree() -> None:
    case = Case(7, 3, 4)
    fixed = [case.velocity, case.old, case.noisy, case.clean]
    options = {"beta": 1.0, "advantage_max": 5.0}
    expected = nft_loss(*fixed, 0.4, case.advantages, **options).loss
    for sigma in (torch.tensor(0.4), torch.full((3,), 0.4)):
        torch.testing.assert_close(nft_loss(*fixed, sigma, case.advantages, **options).loss, expected)


def test_kl_pulls_to_the_reference_and_is_logged_without_a_coefficient() -> None:
    case = Case(8, 3, 4)
    reference = draw(99, 3, 4)
    logged = case.loss(reference_velocity=reference)
    assert logged.loss == case.loss().loss and logged.kl is not None
    torch.testing.assert_close(logged.kl, (case.velocity - reference).square().mean())
    pull = case.gradient(case.velocity, reference_velocity=reference, kl_coef=0.3) - case.gradient(case.velocity)
    torch.testing.assert_close(pull, 0.3 * 2 * (case.velocity - reference) / 12, rtol=1e-3, atol=1e-5)


def test_gradient_reaches_the_velocity_only_and_half_precision_is_raised() -> None:
    leaves = [draw(seed, 2, 3).to(torch.bfloat16).requires_grad_() for seed in range(5)]
    options = {"beta": 1.0, "advantage_max": 5.0, "kl_coef": 0.1}
    result = nft_loss(*leaves[:4], 0.5, torch.ones(2), reference_velocity=leaves[4], **options)
    result.loss.backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, False, False]
    as_float = [leaf.detach().float() for leaf in leaves]
    expected = nft_loss(*as_float[:4], 0.5, torch.ones(2), reference_velocity=as_float[4], **options)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, expected.loss)
    assert not any(value.requires_grad for name, value in vars(result).items() if name != "loss")


def test_a_perfect_prediction_does_not_divide_by_zero() -> None:
    case = Case(9, 2, 3)
    case.old = case.target
    result = case.loss(case.target)
    assert result.loss.item() == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(case.gradient(case.target)).all()


def test_decay_schedules() -> None:
    assert [old_policy_decay(step, "none") for step in (0, 10, 10_000)] == [0, 0, 0]
    ramp = [old_policy_decay(step, "ramp") for step in (0, 1, 250, 500, 501, 10_000)]
    assert ramp == pytest.approx([0, 0.001, 0.25, 0.5, 0.5, 0.5])
    late = [old_policy_decay(step, "late_ramp") for step in (0, 75, 76, 175, 208, 209, 10_000)]
    assert late == pytest.approx([0, 0, 0.0075, 0.75, 0.9975, 0.999, 0.999])


GOOD = {
    "velocity": torch.zeros(2, 3),
    "old_velocity": torch.zeros(2, 3),
    "noisy": torch.zeros(2, 3),
    "clean": torch.zeros(2, 3),
    "sigma": 0.5,
    "advantages": torch.zeros(2),
    "beta": 1.0,
    "advantage_max": 5.0,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"velocity": torch.zeros(2)}, r"velocity .*\[B, \*dims\]"),
        ({"velocity": torch.full((2, 3), NAN)}, "velocity holds NaN"),
        ({"old_velocity": torch.zeros(2, 4)}, "old_velocity must have the shape of velocity"),
        ({"noisy": torch.full((2, 3), math.inf)}, "noisy holds NaN or inf"),
        ({"clean": torch.zeros(1, 3)}, "clean must have the shape"),
        ({"sigma": 0.0}, "sigma must lie"),
        ({"sigma": torch.tensor([0.5, 1.5])}, "sigma must lie"),
        ({"sigma": torch.zeros(3)}, "sigma must be a number"),
        ({"advantages": torch.zeros(2, 3)}, r"advantages must have shape \[2\]"),
        ({"advantages": torch.tensor([0.0, NAN])}, "advantages holds NaN"),
        ({"beta": 0.0}, "beta must be"),
        ({"advantage_max": -1.0}, "advantage_max must be"),
        ({"kl_coef": 0.1}, "reference_velocity is needed"),
        ({"kl_coef": -0.1, "reference_velocity": torch.zeros(2, 3)}, "kl_coef must be"),
        ({"reference_velocity": torch.zeros(3, 3)}, "reference_velocity must have the shape"),
        ({"reference_velocity": torch.full((2, 3), NAN)}, "reference_velocity holds NaN"),
    ],
)
def test_refuses(change: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        nft_loss(**(GOOD | change))


def test_value_checks_can_be_skipped_and_decay_refuses() -> None:
    assert torch.isnan(nft_loss(**(GOOD | {"clean": torch.full((2, 3), NAN)}), check_finite=False).loss)
    with pytest.raises(ValueError, match="schedule must be one of"):
        old_policy_decay(0, "fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be"):
        old_policy_decay(-1, "ramp")
