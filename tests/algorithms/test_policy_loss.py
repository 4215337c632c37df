"""Every level, objective and aggregation against hand-computed values and against autograd."""

import math

import pytest
import torch

from glm_training.algorithms.policy_loss import PolicyLoss, policy_loss

NAN = math.nan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def log_ratios(*ratios: float) -> torch.Tensor:
    return torch.tensor([ratios]).log()


def gradient(log_probs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    leaf = log_probs.detach().clone().requires_grad_()
    policy_loss(leaf, *args, **kwargs).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


# -- objectives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # held at 1 + high = 1.3
        (0.5, 2.0, -1.0, -1.0),  # too low for a good action: not clipped
        (1.5, -2.0, 3.0, 3.0),  # too high for a bad action: not clipped
        (0.5, -2.0, 1.6, 0.0),  # held at 1 - low = 0.8
        (0.9, -2.0, 1.8, 1.8),
    ],
)
def test_ppo_term_and_slope(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_probs, old, advantages = log_ratios(ratio), torch.zeros(1, 1), torch.tensor([advantage])
    result = policy_loss(log_probs, old, advantages, clip=(0.2, 0.3))
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert gradient(log_probs, old, advantages, clip=(0.2, 0.3)).item() == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert result.clip_fraction.item() == float(slope == 0.0)


@pytest.mark.parametrize(("ratio", "weight"), [(0.1, 0.1), (1.0, 1.0), (1.9, 1.9), (2.5, 2.0)])
@pytest.mark.parametrize("advantage", [3.0, -3.0])
def test_cispo_term_and_slope(ratio: float, weight: float, advantage: float) -> None:
    old = torch.full((1, 1), -4.0)
    log_probs, advantages = old + math.log(ratio), torch.tensor([advantage])
    result = policy_loss(log_probs, old, advantages, clip=(0.0, 2.0), objective="cispo")
    assert result.loss.item() == pytest.approx(-weight * advantage * log_probs.item(), rel=1e-5)
    slope = gradient(log_probs, old, advantages, clip=(0.0, 2.0), objective="cispo").item()
    assert slope == pytest.approx(-weight * advantage, rel=1e-5), "a capped action keeps a gradient"
    assert result.clip_fraction.item() == float(ratio > 2.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["ppo", "cispo"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_on_policy_gradient_is_the_policy_gradient(level, objective, aggregation) -> None:
    log_probs, advantages = draw(0, 3, 5), draw(1, 3)
    options = {"constant_length": 7} if aggregation == "constant" else {}
    slope = gradient(
        log_probs,
        log_probs,
        advantages,
        clip=(0.2, 1.5),
        level=level,
        objective=objective,
        aggregation=aggregation,
        **options,
    )
    count = 3 * 7 if aggregation == "constant" else 15
    torch.testing.assert_close(slope, (-advantages[:, None] / count).expand(3, 5))


def test_a_step_raises_good_and_lowers_bad_actions() -> None:
    log_probs = draw(2, 4, 3)
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0])
    slope = gradient(log_probs, log_probs, advantages)
    assert torch.equal(torch.sign(-slope), torch.sign(advantages)[:, None].expand(4, 3))


def test_token_advantages_are_used_per_token() -> None:
    log_probs, advantages = draw(3, 2, 4), draw(4, 2, 4)
    torch.testing.assert_close(gradient(log_probs, log_probs, advantages), -advantages / 8)
    spread = draw(5, 2)[:, None].expand(2, 4)
    by_token = policy_loss(log_probs, log_probs - 0.1, spread).loss
    torch.testing.assert_close(by_token, policy_loss(log_probs, log_probs - 0.1, spread[:, 0]).loss)


# -- sequence level ----------------------------------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean_over_unmasked_actions() -> None:
    log_probs = log_ratios(2.0, 0.5, 8.0, 1e6)
    mask = torch.tensor([[1, 1, 1, 0]])
    result = policy_loss(log_probs, torch.zeros(1, 4), torch.tensor([1.0]), mask, clip=(9.0, 9.0), level="sequence")
    assert result.loss.item() == pytest.approx(-2.0, rel=1e-5)  # (2 * 0.5 * 8) ** (1 / 3)
    assert result.ratio_mean.item() == pytest.approx(2.0, rel=1e-5)
    assert result.ratio_max_deviation.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_sequence_level_has_the_gradient_of_gspo(seed: int) -> None:
    old, advantages = draw(seed, 24, 6), draw(seed + 10, 24)
    log_probs = old + 0.1 * draw(seed + 20, 24, 6)
    mask = draw(seed + 30, 24, 6) > -0.8
    leaf = log_probs.clone().requires_grad_()
    mean = ((leaf - old) * mask).sum(1) / mask.sum(1)
    ratio = mean.exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.97, 1.02) * advantages).mean()
    expected.backward()
    result = policy_loss(log_probs, old, advantages, mask, clip=(0.03, 0.02), level="sequence")
    torch.testing.assert_close(result.loss, expected.detach())
    slope = gradient(log_probs, old, advantages, mask, clip=(0.03, 0.02), level="sequence")
    torch.testing.assert_close(slope, leaf.grad)
    assert 0 < result.clip_fraction < 1, "the case must have clipped and unclipped sequences"


# -- aggregation, mask, weights ----------------------------------------------------------------------------------------

# On policy, ppo terms are minus the advantages, so token advantages write the terms by hand.
TERMS = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
WEIGHTS = torch.tensor([[1.0, 3.0, 9.0], [0.5, 9.0, 9.0]])


def loss_of_terms(**kwargs) -> float:
    zeros = torch.zeros(2, 3)
    return policy_loss(zeros, zeros, -TERMS, **kwargs).loss.item()


def test_aggregations_by_hand() -> None:
    assert loss_of_terms() == pytest.approx((2 + 20) / 2)
    assert loss_of_terms(mask=MASK) == pytest.approx((1.5 + 10) / 2)
    assert loss_of_terms(mask=MASK, aggregation="token_mean") == pytest.approx(13 / 3)
    assert loss_of_terms(mask=MASK, aggregation="token_mean", global_token_count=10) == pytest.approx(1.3)
    assert loss_of_terms(mask=MASK, aggregation="token_mean", global_token_count=torch.tensor(10)) == pytest.approx(1.3)
    assert loss_of_terms(mask=MASK, aggregation="constant", constant_length=4) == pytest.approx(13 / 8)


def test_weighted_aggregations_by_hand() -> None:
    both = {"mask": MASK, "weights": WEIGHTS}
    assert loss_of_terms(**both) == pytest.approx(((1 + 6) / 4 + 10) / 2)
    assert loss_of_terms(**both, aggregation="token_mean") == pytest.approx((1 + 6 + 5) / 4.5)
    assert loss_of_terms(**both, aggregation="token_mean", global_token_count=9.0) == pytest.approx(12 / 9)
    assert loss_of_terms(**both, aggregation="constant", constant_length=4) == pytest.approx(12 / 8)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_equal_weights_change_nothing(aggregation) -> None:
    old, log_probs, advantages = draw(0, 3, 4), draw(1, 3, 4), draw(2, 3)
    plain = policy_loss(log_probs, old, advantages, aggregation=aggregation).loss
    weighted = policy_loss(log_probs, old, advantages, aggregation=aggregation, weights=torch.full((3, 4), 1e-3)).loss
    torch.testing.assert_close(weighted, plain)


def test_weight_zero_equals_a_mask_in_the_loss() -> None:
    old, log_probs, advantages = draw(0, 3, 4), draw(1, 3, 4), draw(2, 3)
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    masked = policy_loss(log_probs, old, advantages, keep).loss
    torch.testing.assert_close(policy_loss(log_probs, old, advantages, weights=keep.float()).loss, masked)


@pytest.mark.parametrize("split", [1, 2, 5])
def test_chunks_with_the_global_count_add_up_to_the_whole(split: int) -> None:
    old, log_probs, advantages, weights = draw(0, 6, 5), draw(1, 6, 5), draw(2, 6), draw(3, 6, 5).abs()
    mask = draw(4, 6, 5) > 0
    options = {"aggregation": "token_mean", "kl_coef": 0.1}
    whole = policy_loss(
        log_probs, old, advantages, mask, weights=weights, reference_log_probs=old - 0.3, **options
    ).loss
    total = (weights * mask).sum()
    parts = [
        policy_loss(
            log_probs[rows],
            old[rows],
            advantages[rows],
            mask[rows],
            weights=weights[rows],
            reference_log_probs=old[rows] - 0.3,
            global_token_count=total,
            **options,
        ).loss
        for rows in (slice(None, split), slice(split, None))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_long_sequences_weigh_more_under_token_mean_only() -> None:
    log_probs, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    advantages = torch.tensor([1.0, 1.0])
    by_sequence = gradient(log_probs, log_probs, advantages, mask)
    by_token = gradient(log_probs, log_probs, advantages, mask, aggregation="token_mean")
    assert by_sequence.sum(1).tolist() == pytest.approx([-0.5, -0.5])
    assert by_token.sum(1).tolist() == pytest.approx([-0.8, -0.2])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["ppo", "cispo"])
def test_masked_actions_reach_nothing_even_as_nan(level, objective) -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    clean = [draw(seed, 2, 4) for seed in range(4)]
    dirty = [torch.where(mask.bool(), tensor, NAN) for tensor in clean]

    def evaluate(tensors: list[torch.Tensor]) -> tuple[PolicyLoss, torch.Tensor]:
        log_probs = tensors[0].clone().requires_grad_()
        result = policy_loss(
            log_probs,
            tensors[1],
            tensors[2],
            mask,
            clip=(0.2, 1.2),
            level=level,
            objective=objective,
            reference_log_probs=tensors[3],
            kl_coef=0.1,
        )
        result.loss.backward()
        assert log_probs.grad is not None
        return result, log_probs.grad

    (expected, slope), (found, dirty_slope) = evaluate(clean), evaluate(dirty)
    torch.testing.assert_close(vars(found), vars(expected))
    torch.testing.assert_close(dirty_slope, slope)
    assert not dirty_slope[mask == 0].any() and dirty_slope[mask == 1].all()


def test_a_fully_masked_sequence_adds_zero_and_counts() -> None:
    zeros, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert policy_loss(zeros, zeros, -TERMS, mask).loss.item() == pytest.approx(2 / 2)


def test_an_empty_chunk_is_fine_when_the_caller_counts() -> None:
    zeros, mask = torch.zeros(2, 3), torch.zeros(2, 3)
    result = policy_loss(zeros, zeros, -TERMS, mask, aggregation="token_mean", global_token_count=5)
    assert all(value == 0 for value in vars(result).values() if value is not None)


# -- figures and reference KL ------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    log_probs = torch.tensor([[1.5, 0.5, 1.0, 9.0], [0.9, 9.0, 9.0, 9.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    result = policy_loss(log_probs, torch.zeros(2, 4), torch.tensor([1.0, -1.0]), mask)
    assert result.ratio_mean.item() == pytest.approx((1.5 + 0.5 + 1.0 + 0.9) / 4)
    assert result.ratio_max_deviation.item() == pytest.approx(0.5)
    assert result.clip_fraction.item() == pytest.approx(1 / 4)
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.5, 1.0, 0.9)]
    assert result.approx_kl.item() == pytest.approx(sum(k3) / 4, rel=1e-5)
    assert result.reference_kl is None
    assert not any(value.requires_grad for name, value in vars(result).items() if value is not None and name != "loss")


def test_the_kl_of_each_token_can_have_a_weight() -> None:
    """In the loss; the figure stays what it is. What stands at a masked token is not looked at."""
    log_probs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, 5.0]])
    mask, weights = torch.tensor([[True, True, False]]), torch.tensor([[0.5, 3.0, math.nan]])
    result = policy_loss(
        log_probs,
        log_probs,
        torch.zeros(1),
        mask,
        reference_log_probs=reference,
        kl_coef=0.25,
        kl_weights=weights,
    )
    first, second = math.exp(-0.5) + 0.5 - 1, math.exp(1.0) - 1.0 - 1
    assert result.loss.item() == pytest.approx(0.25 * (0.5 * first + 3.0 * second) / 2, rel=1e-5)
    assert result.reference_kl is not None and result.reference_kl.item() == pytest.approx((first + second) / 2)
    with pytest.raises(ValueError, match=r"kl_weights must have the shape of log_probs"):
        policy_loss(log_probs, log_probs, torch.zeros(1), kl_weights=weights[:, :2])


def test_reference_kl_is_k3_inside_the_mask() -> None:
    log_probs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, 5.0]])
    mask = torch.tensor([[1, 1, 0]])
    result = policy_loss(log_probs, log_probs, torch.zeros(1), mask, reference_log_probs=reference, kl_coef=0.25)
    expected = (math.exp(-0.5) + 0.5 - 1 + math.exp(1.0) - 1.0 - 1) / 2
    assert result.reference_kl is not None and result.reference_kl.item() == pytest.approx(expected, rel=1e-5)
    assert result.loss.item() == pytest.approx(0.25 * expected, rel=1e-5)
    slope = gradient(log_probs, log_probs, torch.zeros(1), mask, reference_log_probs=reference, kl_coef=0.25)
    by_hand = [0.25 * (1 - math.exp(-0.5)) / 2, 0.25 * (1 - math.exp(1.0)) / 2, 0.0]
    assert slope[0].tolist() == pytest.approx(by_hand, rel=1e-5), "pulls log_probs towards the reference"


def test_reference_kl_is_exactly_zero_at_the_reference_and_alive_next_to_it() -> None:
    log_probs = draw(0, 2, 3)
    at = policy_loss(log_probs, log_probs, torch.zeros(2), reference_log_probs=log_probs, kl_coef=1.0)
    assert at.reference_kl is not None and at.reference_kl.item() == 0 and at.loss.item() == 0
    slope = gradient(log_probs + 1e-3, log_probs, torch.zeros(2), reference_log_probs=log_probs, kl_coef=1.0)
    torch.testing.assert_close(slope, torch.full((2, 3), 1e-3 / 6), rtol=1e-2, atol=0)


def test_reference_without_coefficient_is_only_logged() -> None:
    log_probs, advantages = draw(0, 2, 3), draw(1, 2)
    plain = policy_loss(log_probs, log_probs, advantages)
    logged = policy_loss(log_probs, log_probs, advantages, reference_log_probs=log_probs - 1)
    assert logged.loss == plain.loss
    assert logged.reference_kl is not None and logged.reference_kl.item() == pytest.approx(math.exp(-1), rel=1e-5)


def test_only_log_probs_get_a_gradient_and_half_precision_is_raised() -> None:
    leaves = [draw(seed, 2, 3).to(torch.bfloat16).requires_grad_() for seed in range(3)]
    result = policy_loss(leaves[0], leaves[1], leaves[1], reference_log_probs=leaves[2], kl_coef=0.1)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert leaves[0].grad is not None and leaves[1].grad is None and leaves[2].grad is None
    as_float = [leaf.detach().float() for leaf in leaves]
    expected = policy_loss(as_float[0], as_float[1], as_float[1], reference_log_probs=as_float[2], kl_coef=0.1)
    torch.testing.assert_close(result.loss, expected.loss)


# -- refusals ----------------------------------------------------------------------------------------------------------

ZEROS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"log_probs": torch.zeros(3)}, r"log_probs .*\[B, L\]"),
        ({"log_probs": torch.full((2, 3), NAN)}, "log_probs holds NaN"),
        ({"old_log_probs": torch.zeros(2, 4)}, "old_log_probs must have the shape of log_probs"),
        ({"old_log_probs": torch.full((2, 3), -math.inf)}, "old_log_probs holds NaN or inf"),
        ({"advantages": torch.zeros(3)}, r"advantages must have shape \[2\] or \[2, 3\]"),
        ({"advantages": torch.tensor([NAN, 0.0])}, "advantages holds NaN"),
        ({"mask": torch.zeros(3, 2)}, "mask must have the shape"),
        ({"mask": torch.zeros(2, 3)}, "mask and weights leave no action"),
        ({"weights": torch.zeros(2)}, "weights must have the shape"),
        ({"weights": torch.full((2, 3), -1.0)}, "weights must be >= 0"),
        ({"weights": torch.full((2, 3), math.inf)}, "weights holds NaN or inf"),
        ({"reference_log_probs": torch.zeros(1, 3)}, "reference_log_probs must have the shape"),
        ({"reference_log_probs": torch.full((2, 3), NAN)}, "reference_log_probs holds NaN"),
        ({"kl_coef": 0.1}, "reference_log_probs is needed"),
        ({"kl_coef": -0.1, "reference_log_probs": ZEROS}, "kl_coef"),
        ({"clip": (-0.1, 0.2)}, "clip must be"),
        ({"clip": (0.1, NAN)}, "clip must be"),
        ({"objective": "cispo", "clip": (0.2, 0.2)}, r"clip\[1\] caps the ratio itself"),
        ({"objective": "vanilla"}, "objective must be one of"),
        ({"level": "word"}, "level must be one of"),
        ({"aggregation": "sum"}, "aggregation must be one of"),
        ({"aggregation": "constant"}, "constant_length must be given"),
        ({"constant_length": 4}, "constant_length must be given .* only there"),
        ({"aggregation": "constant", "constant_length": 0}, "constant_length must be"),
        ({"global_token_count": 4}, "global_token_count belongs"),
        ({"aggregation": "token_mean", "global_token_count": 0}, "global_token_count must be"),
        ({"aggregation": "token_mean", "global_token_count": torch.ones(2)}, "global_token_count must be one number"),
    ],
)
def test_refuses(change: dict, named: str) -> None:
    arguments = {"log_probs": ZEROS, "old_log_probs": ZEROS, "advantages": torch.ones(2)} | change
    with pytest.raises(ValueError, match=named):
        policy_loss(**arguments)


def test_value_checks_can_be_skipped() -> None:
    result = policy_loss(torch.full((2, 3), NAN), ZEROS, torch.ones(2), check_finite=False)
    assert torch.isnan(result.loss)
