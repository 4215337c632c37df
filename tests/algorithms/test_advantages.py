"""Group statistics against hand-computed values, several rewards with gaps, and the plan/render tree."""

import math

import pytest
import torch

from glm_training.algorithms.advantages import (
    combine_rewards,
    group_advantages,
    plan_render_advantages,
    plan_render_gdpo,
)

NAN = math.nan


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- group_advantages --------------------------------------------------------------------------------------------------


def test_group_scale_by_hand() -> None:
    # mean 2, deviations -1 0 1, sample std 1; mean 4, deviations -4 0 4, sample std 4
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 4.0, 8.0]])
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-4.0, 0.0, 4.0]]) / torch.tensor([[1.5], [4.5]])
    torch.testing.assert_close(group_advantages(rewards, eps=0.5), expected)


def test_batch_scale_divides_every_group_by_the_std_of_all_rewards() -> None:
    rewards = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # mean 4, squared deviations 9 1 1 9, sample variance 20/3
    expected = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) / (math.sqrt(20 / 3) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, scale="batch"), expected)


def test_no_scale_only_centres() -> None:
    rewards = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    torch.testing.assert_close(group_advantages(rewards, scale="none"), torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_zero_spread_group_is_exactly_zero_and_leaves_the_others_alone(scale: str) -> None:
    rewards = torch.tensor([[0.1] * 7, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0, "the mean must round, or this tests nothing"
    advantages = group_advantages(rewards, scale=scale)
    assert torch.equal(advantages[0], torch.zeros(7))
    assert advantages[1].abs().min() == 0 and advantages[1, 0] < 0 < advantages[1, 6]


@pytest.mark.parametrize("shape", [(1, 2), (3, 8), (16, 5)])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_groups_sum_to_zero_keep_their_order_and_ignore_an_offset_per_prompt(shape: tuple[int, int], scale) -> None:
    rewards = draw(sum(shape), *shape)
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.dtype == torch.float32 and advantages.shape == shape
    torch.testing.assert_close(advantages.sum(1), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))
    if scale != "batch":
        shifted = group_advantages(rewards + torch.arange(float(shape[0]))[:, None], scale=scale)
        torch.testing.assert_close(shifted, advantages, atol=1e-4, rtol=1e-4)


def test_group_scale_has_unit_std_and_does_not_see_the_reward_scale() -> None:
    rewards = draw(0, 4, 9)
    advantages = group_advantages(100 * rewards, eps=0.0)
    torch.testing.assert_close(advantages.std(1), torch.ones(4))
    torch.testing.assert_close(advantages, group_advantages(rewards, eps=0.0))


def test_statistics_are_fp32_and_without_gradient() -> None:
    rewards = draw(1, 2, 4).to(torch.bfloat16).requires_grad_()
    advantages = group_advantages(rewards)
    assert advantages.dtype == torch.float32 and not advantages.requires_grad
    torch.testing.assert_close(advantages, group_advantages(rewards.detach().float()))


@pytest.mark.parametrize(
    ("rewards", "kwargs", "named"),
    [
        (torch.zeros(3), {}, r"rewards .*\[P, G\].*\[3\]"),
        (torch.zeros(0, 4), {}, "rewards"),
        (torch.zeros(3, 1), {}, "rewards has groups of one"),
        (torch.zeros(3, 1), {"scale": "none"}, "rewards has groups of one"),
        (torch.tensor([[0.0, NAN]]), {}, "rewards holds NaN"),
        (torch.tensor([[0.0, math.inf]]), {}, "rewards holds NaN or inf"),
        (torch.zeros(2, 2), {"scale": "std"}, "scale must be one of group, batch, none"),
        (torch.zeros(2, 2), {"eps": -1.0}, "eps"),
    ],
)
def test_group_advantages_refuses(rewards: torch.Tensor, kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        group_advantages(rewards, **kwargs)


# -- combine_rewards ---------------------------------------------------------------------------------------------------


def test_sum_is_the_weighted_sum_of_raw_rewards() -> None:
    components = {"ocr": torch.tensor([[0.5, 1.0]]), "lpips": torch.tensor([[0.2, 0.4]])}
    combined = combine_rewards(components, {"lpips": -2.0, "ocr": 3.0})
    torch.testing.assert_close(combined, torch.tensor([[1.5 - 0.4, 3.0 - 0.8]]))


def test_sum_scales_up_the_weights_that_apply() -> None:
    components = {
        "ocr": torch.tensor([[0.5, NAN, 0.5]]),
        "lpips": torch.tensor([[0.2, 0.4, NAN]]),
        "size": torch.tensor([[1.0, 1.0, 1.0]]),
    }
    combined = combine_rewards(components, {"ocr": 3.0, "lpips": -2.0, "size": 1.0})
    expected = [1.5 - 0.4 + 1, 6 / 3 * (-0.8 + 1), 6 / 4 * (1.5 + 1)]  # |weights| add up to 6
    torch.testing.assert_close(combined, torch.tensor([expected]))


def test_a_metric_that_never_applies_does_not_change_a_constant_reward() -> None:
    # every metric that applies says 0.7, so with weights that sum to one the reward is 0.7 whatever is missing
    mask = draw(3, 4, 6) > 0
    components = {
        "a": torch.full((4, 6), 0.7),
        "b": torch.where(mask, 0.7, NAN),
        "c": torch.where(~mask, 0.7, NAN),
    }
    combined = combine_rewards(components, {"a": 0.2, "b": 0.5, "c": 0.3})
    torch.testing.assert_close(combined, torch.full((4, 6), 0.7))


def test_gdpo_by_hand() -> None:
    components = {"a": torch.tensor([[0.0, 1.0], [0.0, 100.0]]), "b": torch.tensor([[2.0, 0.0], [5.0, 5.0]])}
    # normalised with std |d|/sqrt(2): a -> -+1/sqrt2 in both groups, b -> +-1/sqrt2 and zeros; weights 2 and 1
    total = torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]) / math.sqrt(2)
    std = math.sqrt((0.5 + 0.5 + 2 + 2) / 3)
    combined = combine_rewards(components, {"a": 2.0, "b": 1.0}, method="gdpo", eps=0.0)
    torch.testing.assert_close(combined, total / std)


def test_gdpo_with_one_metric_is_group_normalisation_then_the_batch_std() -> None:
    rewards = draw(5, 6, 8)
    grouped = group_advantages(rewards)
    combined = combine_rewards({"only": rewards}, {"only": 0.3}, method="gdpo")
    torch.testing.assert_close(combined, 0.3 * grouped / ((0.3 * grouped).std() + 1e-4))


def test_gdpo_does_not_collapse_where_the_plain_sum_does() -> None:
    # the paper's motive: after a raw sum, (0, 1) and (0, 2) rewards give the same group-normalised advantages
    easy, hard = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    weights = {"easy": 1.0, "hard": 1.0}
    summed = group_advantages(combine_rewards({"easy": easy, "hard": hard}, weights), eps=0.0)
    torch.testing.assert_close(summed[0], summed[1])
    decoupled = combine_rewards({"easy": easy, "hard": hard}, weights, method="gdpo")
    torch.testing.assert_close(decoupled[1], 2 * decoupled[0], rtol=1e-3, atol=0)


def test_gdpo_leaves_missing_entries_out_of_the_statistics() -> None:
    components = {
        "a": torch.tensor([[0.0, 1.0, 2.0, 3.0]]),
        "b": torch.tensor([[10.0, NAN, 30.0, NAN]]),  # mean 20, std 10 sqrt 2
        "c": torch.tensor([[NAN, NAN, NAN, 7.0]]),  # a single entry: nothing to compare with
    }
    a = torch.tensor([[-1.5, -0.5, 0.5, 1.5]]) / math.sqrt(5 / 3)
    b = torch.tensor([[-1.0, 0.0, 1.0, 0.0]]) / math.sqrt(2)
    combined = combine_rewards(components, {"a": 1.0, "b": 2.0, "c": 50.0}, method="gdpo", eps=0.0)
    torch.testing.assert_close(combined, (a + 2 * b) / (a + 2 * b).std())


@pytest.mark.parametrize("seed", range(4))
def test_gdpo_batch_mean_is_zero_so_leaving_it_out_is_exact(seed: int) -> None:
    values = draw(seed, 2, 5, 7)
    components = {"a": values[0], "b": torch.where(values[1] > 1, NAN, values[1])}
    combined = combine_rewards(components, {"a": 1.0, "b": 0.5}, method="gdpo")
    torch.testing.assert_close(combined.sum(1), torch.zeros(5), atol=1e-5, rtol=0)
    assert combined.std() == pytest.approx(1.0, abs=1e-3)


def test_gdpo_group_without_spread_is_exactly_zero() -> None:
    components = {"a": torch.tensor([[0.1] * 7, [0.0, 1, 2, 3, 4, 5, 6]]), "b": torch.full((2, 7), 0.3)}
    combined = combine_rewards(components, {"a": 1.0, "b": 1.0}, method="gdpo")
    assert torch.equal(combined[0], torch.zeros(7)) and combined[1].abs().max() > 1


@pytest.mark.parametrize(
    ("components", "weights", "kwargs", "named"),
    [
        ({}, {}, {}, "components and weights"),
        ({"a": torch.zeros(2, 2)}, {"a": 1.0, "b": 1.0}, {}, r"without component: \['b'\]"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, {"a": 1.0}, {}, r"without weight: \['b'\]"),
        ({"a": torch.zeros(2, 2), "b": torch.zeros(2, 3)}, {"a": 1.0, "b": 1.0}, {}, r"components\['b'\] has shape"),
        ({"a": torch.zeros(2)}, {"a": 1.0}, {}, r"components\['a'\] must be"),
        ({"a": torch.tensor([[0.0, math.inf]])}, {"a": 1.0}, {}, r"components\['a'\] holds infinite"),
        ({"a": torch.zeros(2, 2)}, {"a": NAN}, {}, r"weights\['a'\]"),
        ({"a": torch.zeros(2, 2)}, {"a": 0.0}, {}, "weights are all zero"),
        ({"a": torch.tensor([[0.0, NAN]])}, {"a": 1.0}, {}, r"components: no metric .* 1 samples, .*\(0, 1\)"),
        ({"a": torch.tensor([[0.0, NAN]])}, {"a": 1.0}, {"method": "gdpo"}, r"no metric .*\(0, 1\)"),
        ({"a": torch.zeros(2, 1)}, {"a": 1.0}, {"method": "gdpo"}, "components has groups of one"),
        ({"a": torch.zeros(2, 2)}, {"a": 1.0}, {"method": "mean"}, "method must be one of sum, gdpo"),
    ],
)
def test_combine_rewards_refuses(components: dict, weights: dict, kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        combine_rewards(components, weights, **kwargs)


def test_a_metric_of_weight_zero_does_not_make_a_sample_scorable() -> None:
    components = {"logged": torch.zeros(1, 2), "used": torch.tensor([[0.0, NAN]])}
    with pytest.raises(ValueError, match=r"no metric with a weight .*\(0, 1\)"):
        combine_rewards(components, {"logged": 0.0, "used": 1.0})


# -- plan_render_advantages --------------------------------------------------------------------------------------------


def test_tree_by_hand() -> None:
    rewards = torch.tensor([[[0.0, 2.0], [4.0, 10.0]]])  # plan means 1 and 7, prompt mean 4
    tree = plan_render_advantages(rewards, scale="none")
    torch.testing.assert_close(tree.plan, torch.tensor([[-3.0, 3.0]]))
    torch.testing.assert_close(tree.render, torch.tensor([[[-1.0, 1.0], [-3.0, 3.0]]]))
    # MS_between = 2 (9 + 9) / 1 = 36, MS_within = (1 + 1 + 9 + 9) / 2 = 10, var_plan = 13
    assert tree.plan_variance_share.item() == pytest.approx(13 / 23)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 4, 5), (2, 7, 3)])
def test_each_level_is_group_advantages_of_that_level(scale, shape: tuple[int, int, int]) -> None:
    rewards = draw(sum(shape), *shape)
    tree = plan_render_advantages(rewards, scale=scale, eps=1e-3)
    prompts, plans, renders = shape
    torch.testing.assert_close(tree.plan, group_advantages(rewards.mean(2), scale=scale, eps=1e-3))
    siblings = group_advantages(rewards.reshape(prompts * plans, renders), scale=scale, eps=1e-3)
    torch.testing.assert_close(tree.render, siblings.reshape(shape))


def test_unscaled_levels_add_up_to_the_flat_advantage() -> None:
    rewards = draw(11, 3, 4, 5)
    tree = plan_render_advantages(rewards, scale="none")
    flat = group_advantages(rewards.reshape(3, 20), scale="none").reshape(3, 4, 5)
    torch.testing.assert_close(tree.plan[:, :, None] + tree.render, flat)


def test_variance_share_finds_the_half_that_matters() -> None:
    plan_part, render_part = draw(1, 400, 6, 1), draw(2, 400, 6, 5)

    def share(rewards: torch.Tensor) -> float:
        return plan_render_advantages(rewards).plan_variance_share.item()

    assert share(plan_part.expand(400, 6, 5)) == pytest.approx(1.0)
    assert share(render_part) < 0.03, "renders alone also make plan means differ; the correction must remove that"
    assert share(2 * plan_part + render_part) == pytest.approx(4 / 5, abs=0.03)
    assert share(plan_part + 2 * render_part) == pytest.approx(1 / 5, abs=0.03)
    prompt_part = 50 * draw(3, 400, 1, 1)
    assert share(prompt_part + plan_part + render_part) == pytest.approx(1 / 2, abs=0.03)


def test_variance_share_is_not_negative_when_plan_means_agree_by_chance() -> None:
    rewards = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]])  # equal plan means: MS_between = 0 < MS_within
    assert plan_render_advantages(rewards).plan_variance_share.item() == 0


def test_one_plan_gives_render_advantages_only() -> None:
    rewards = draw(4, 3, 1, 6)
    tree = plan_render_advantages(rewards)
    assert torch.equal(tree.plan, torch.zeros(3, 1)) and torch.isnan(tree.plan_variance_share)
    torch.testing.assert_close(tree.render[:, 0], group_advantages(rewards[:, 0]))


def test_one_render_gives_plan_advantages_only() -> None:
    rewards = draw(4, 3, 6, 1)
    tree = plan_render_advantages(rewards)
    assert torch.equal(tree.render, torch.zeros(3, 6, 1)) and torch.isnan(tree.plan_variance_share)
    torch.testing.assert_close(tree.plan, group_advantages(rewards[..., 0]))


@pytest.mark.parametrize(("plans", "renders"), [(6, 1), (3, 4)])
def test_renders_compared_across_plans_are_one_group_and_plans_are_compared_as_ever(plans: int, renders: int) -> None:
    rewards = draw(4, 5, plans, renders)
    scored = torch.ones_like(rewards, dtype=torch.bool)
    scored[0, 0, 0] = False
    tree = plan_render_advantages(rewards, scale="none", scored=scored, across_plans=True)
    torch.testing.assert_close(tree.plan, plan_render_advantages(rewards, scale="none", scored=scored).plan)
    group = rewards[1:].flatten(1)
    torch.testing.assert_close(tree.render[1:].flatten(1), group - group.mean(1, keepdim=True))
    rest = rewards[0].flatten()[1:]
    assert tree.render[0, 0, 0] == 0
    torch.testing.assert_close(tree.render[0].flatten()[1:], rest - rest.mean())


def test_equal_rewards_give_zeros_and_no_share() -> None:
    tree = plan_render_advantages(torch.full((2, 3, 7), 0.1))
    assert not tree.plan.any() and not tree.render.any() and torch.isnan(tree.plan_variance_share)


@pytest.mark.parametrize(
    ("rewards", "named"),
    [
        (torch.zeros(3, 1, 1), "rewards has one plan and one render"),
        (torch.zeros(3, 4), r"rewards .*\[P, N, M\]"),
        (torch.full((2, 2, 2), NAN), "rewards holds NaN"),
    ],
)
def test_tree_refuses(rewards: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_render_advantages(rewards)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_what_was_not_scored_counts_nowhere(scale) -> None:
    rewards = torch.tensor(
        [[[1.0, 2.0], [5.0, 6.0], [NAN, NAN], [4.0, NAN]], [[3.0, 3.5], [9.0, 8.0], [0.0, 1.0], [2.0, 2.0]]]
    )
    tree = plan_render_advantages(rewards, scale=scale, scored=~rewards.isnan())
    assert tree.plan[0, 2] == 0 and not tree.render[0, 2].any() and not tree.render[0, 3].any()
    means = torch.tensor([1.5, 5.5, 4.0]), torch.tensor([3.25, 8.5, 0.5, 2.0])
    spread = {"group": means[0].std(), "batch": torch.cat(means).std(), "none": 1.0 - 1e-4}[scale]
    expected = (means[0] - means[0].mean()) / (spread + 1e-4)
    torch.testing.assert_close(tree.plan[0, [0, 1, 3]], expected)
    alone = plan_render_advantages(rewards[1:])
    torch.testing.assert_close(tree.plan_variance_share, alone.plan_variance_share)
    if scale == "group":
        torch.testing.assert_close(tree.plan[1:], alone.plan)


def test_a_prompt_without_any_score_gets_nothing_and_moves_nobody() -> None:
    rewards = 5 + draw(3, 2, 3, 2)
    scored = torch.ones(2, 3, 2, dtype=torch.bool)
    scored[1] = False
    tree = plan_render_advantages(rewards, scale="batch", scored=scored)
    alone = plan_render_advantages(rewards[:1], scale="batch")
    assert not tree.plan[1].any() and not tree.render[1].any()
    torch.testing.assert_close(tree.plan[:1], alone.plan)
    torch.testing.assert_close(tree.render[:1], alone.render)


def test_non_finite_rewards_are_told_from_wrong_arguments() -> None:
    with pytest.raises(FloatingPointError, match="rewards holds NaN"):
        plan_render_advantages(torch.full((2, 2, 2), math.inf))


# -- plan_render_gdpo --------------------------------------------------------------------------------------------------


def test_gdpo_tree_by_hand() -> None:
    components = {"a": torch.tensor([[[0.0, 2.0], [4.0, 10.0]]]), "b": torch.tensor([[[1.0, 1.0], [NAN, 3.0]]])}
    plan, render = plan_render_gdpo(components, {"a": 1.0, "b": 3.0}, eps=0.0)
    # plan means 1 7 and 1 3: both -+1/sqrt2; the sum -+4/sqrt2 has std 4
    torch.testing.assert_close(plan, torch.tensor([[-1.0, 1.0]]) / math.sqrt(2))
    # a: -+1/sqrt2 in both plans; b: no spread, then one score alone; the sum has variance 4 * 0.5 / 3
    torch.testing.assert_close(render, torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]]) / math.sqrt(2) / math.sqrt(2 / 3))


def test_each_level_of_the_gdpo_tree_is_combine_rewards_of_that_level() -> None:
    values = draw(7, 2, 3, 4, 5)
    components, weights = {"a": values[0], "b": 10 * values[1]}, {"a": 1.0, "b": -0.5}
    plan, render = plan_render_gdpo(components, weights)
    means = {name: value.mean(2) for name, value in components.items()}
    torch.testing.assert_close(plan, combine_rewards(means, weights, method="gdpo"))
    siblings = {name: value.view(12, 5) for name, value in components.items()}
    torch.testing.assert_close(render.view(12, 5), combine_rewards(siblings, weights, method="gdpo"))


@pytest.mark.parametrize("renders", [1, 5])
def test_gdpo_of_renders_compared_across_plans_is_combine_rewards_of_the_prompt(renders: int) -> None:
    values = draw(7, 2, 3, 4, renders)
    components, weights = {"a": values[0], "b": 10 * values[1]}, {"a": 1.0, "b": -0.5}
    plan, render = plan_render_gdpo(components, weights, across_plans=True)
    assert torch.equal(plan, plan_render_gdpo(components, weights)[0])
    together = {name: value.flatten(1) for name, value in components.items()}
    torch.testing.assert_close(render.flatten(1), combine_rewards(together, weights, method="gdpo"))


def test_gdpo_tree_without_plans_or_renders_to_compare_and_without_a_metric() -> None:
    values = draw(8, 3, 4)
    plan, render = plan_render_gdpo({"a": values[:, None]}, {"a": 1.0})
    assert not plan.any()
    torch.testing.assert_close(render[:, 0], combine_rewards({"a": values}, {"a": 1.0}, method="gdpo"))
    plan, render = plan_render_gdpo({"a": values[:, :, None]}, {"a": 1.0})
    assert not render.any()
    torch.testing.assert_close(plan, combine_rewards({"a": values}, {"a": 1.0}, method="gdpo"))
    holed = draw(9, 2, 3, 4)
    holed[0, 1] = NAN
    plan, render = plan_render_gdpo({"a": holed}, {"a": 1.0})
    assert plan[0, 1] == 0 and not render[0, 1].any() and plan[0, 0] != 0
    torch.testing.assert_close(plan[0, 0], -plan[0, 2])  # two around their mean, which is rounded


@pytest.mark.parametrize(
    ("components", "weights", "named"),
    [
        ({"a": torch.zeros(2, 1, 1)}, {"a": 1.0}, "one plan and one render"),
        ({"a": torch.zeros(2, 3)}, {"a": 1.0}, r"components\['a'\] .*\[P, N, M\]"),
        ({"a": torch.zeros(2, 2, 2), "b": torch.zeros(2, 2, 3)}, {"a": 1.0, "b": 1.0}, r"components\['b'\] has shape"),
        ({"a": torch.zeros(2, 2, 2)}, {"b": 1.0}, r"without weight: \['a'\], without component: \['b'\]"),
        ({"a": torch.full((2, 2, 2), math.inf)}, {"a": 1.0}, "components holds NaN or inf"),
    ],
)
def test_gdpo_tree_refuses(components: dict, weights: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_render_gdpo(components, weights)
