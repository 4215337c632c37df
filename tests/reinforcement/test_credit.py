"""From rewards to advantages: what was not scored learns nothing, and a half's reward weight leaves its KL alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from glm_training.algorithms.advantages import PlanRenderAdvantages
from glm_training.reinforcement import credit
from glm_training.reinforcement.credit import Scored, assign_advantages, flat_groups, mean_of_scored
from glm_training.reinforcement.plan_share import plan_share_reading
from glm_training.rewards import RewardResult
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

NAN = float("nan")


def assigned(tmp_path, rewards: torch.Tensor, *overrides: str, step: int = 0) -> tuple[Scored, dict[str, float]]:
    """The one chunk of a step with `rewards` [P, N, M]."""
    result = RewardResult(rewards.flatten(), {"structure": rewards.flatten()}, {})
    prompts, plans, _ = rewards.shape
    rollout = SimpleNamespace(prompts=["a dog"] * prompts, plans=range(prompts * plans))
    chunk = Scored(rollout, result)  # type: ignore[arg-type]
    return chunk, assign_advantages([chunk], config_of(tmp_path, *overrides), World(), step)


def test_plans_that_were_not_scored_get_no_advantage(tmp_path):
    rewards = torch.tensor([[[1.0, 2.0], [NAN, NAN], [4.0, NAN], [9.0, 7.0]], [[NAN] * 2] * 4, [[0.5] * 2] * 4])
    chunk, figures = assigned(tmp_path, rewards)
    plan, render = chunk.plan_advantages.view(3, 4), chunk.render_advantages.view(3, 4, 2)
    assert (plan[0] == 0).tolist() == [False, True, False, False]
    assert not plan[1:].any() and not render[1:].any()
    assert not render[0, 1:3].any() and render[0, 0].all() and render[0, 3].all()
    assert plan[0].sum().abs() < 1e-6
    assert figures["reward/skipped_samples"] == 11
    assert figures["reward/zero_spread_groups"] == 2
    assert figures["reward/total"] == pytest.approx(rewards.nanmean().item())
    assert figures["reward/group_std"] == pytest.approx((rewards[0][~rewards[0].isnan()].std().item() + 0) / 2)


def test_a_group_without_spread_is_left_out_where_that_is_asked(tmp_path):
    """With its KL; and of a half alone. A render's group is its plan."""
    rewards = torch.tensor([[[1.0, 2.0], [0.5, 0.5]], [[0.5, 0.5]] * 2, [[1.0, 0.0], [0.0, 1.0]], [[NAN] * 2] * 2])
    chunk, _ = assigned(tmp_path, rewards, "reward.grpo.ar.skip_flat_groups=true")
    assert chunk.learned_from("ar").tolist() == [True] * 2 + [False] * 6
    assert chunk.learned_from("dit").tolist() == [True] * 12 + [False] * 4
    chunk, _ = assigned(tmp_path, rewards, "reward.grpo.dit.skip_flat_groups=true")
    assert chunk.learned_from("ar").tolist() == [True] * 6 + [False] * 2
    assert chunk.learned_from("dit").tolist() == [True] * 2 + [False] * 6 + [True] * 4 + [False] * 4
    assert chunk.has_score("dit").tolist() == [True] * 12 + [False] * 4


def test_a_half_learns_nothing_from_prompts_that_its_own_metrics_do_not_apply_to(tmp_path):
    """The DiT half is paid for words, which the second prompt asks none of; nor does a control run learn from those."""
    objects, words = torch.tensor([1.0, 0.0, 0.5, 0.1]), torch.tensor([0.0, 0.6, NAN, NAN])
    result = RewardResult(objects, {"structure": objects, "text_accuracy": words}, {})
    chunk = Scored(SimpleNamespace(prompts=['a "B"', "a dog"], plans=range(4)), result)  # type: ignore[arg-type]
    keys = ["reward.metrics={structure: 1, text_accuracy: 1}", "reward.dit.weights={text_accuracy: 1}"]
    keys += ["rollout.plans_per_prompt=2", "rollout.renders_per_plan=1", "reward.grpo.dit.compared_with=prompt"]
    keys += ["reward.grpo.num_samples=2", "reward.grpo.advantage_scale=none"]
    figures = assign_advantages([chunk], config_of(tmp_path, *keys), World(), 0)
    assert chunk.plan_advantages.tolist() == pytest.approx([0.5, -0.5, 0.2, -0.2])
    assert chunk.render_advantages.tolist() == pytest.approx([-0.3, 0.3, 0, 0])
    assert chunk.learned_from("ar").all() and chunk.learned_from("dit").tolist() == [True, True, False, False]
    assert figures["reward/dit_total"] == pytest.approx(0.3) and chunk.has_score("dit").all()
    keys.append("reward.grpo.shuffle_advantages=true")
    assign_advantages([chunk], config_of(tmp_path, *keys), World(), 0)
    assert not chunk.render_advantages[2:].any() and chunk.render_advantages[:2].all()
    result.components["text_accuracy"][:] = NAN
    assert "reward/dit_total" not in assign_advantages([chunk], config_of(tmp_path, *keys[:-1]), World(), 0)
    assert not chunk.learned_from("dit").any()


def test_a_render_may_be_compared_with_all_of_its_prompt(tmp_path):
    """Also metric by metric; a group without spread is then the prompt's."""
    rewards = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.5, 0.5]] * 2])
    keys = ["reward.grpo.dit.compared_with=prompt", "reward.grpo.dit.skip_flat_groups=true"]
    chunk, _ = assigned(tmp_path, rewards, *keys, "reward.grpo.advantage_scale=none")
    assert chunk.render_advantages.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0, 0, 0, 0])
    assert chunk.learned_from("dit").tolist() == [True] * 4 + [False] * 4
    chunk, _ = assigned(tmp_path, rewards, *keys, "reward.combine=gdpo")
    # the step's eight advantages are +-sqrt(3)/2 and 0; their std is sqrt(3 / 7)
    wanted = math.sqrt(3) / 2 / math.sqrt(3 / 7)
    assert chunk.render_advantages.tolist()[:4] == pytest.approx([wanted, wanted, -wanted, -wanted], rel=2e-3)
    even = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])  # a flat plan in a prompt with spread: its mean is the prompt's
    assert assigned(tmp_path, even, *keys)[0].learned_from("dit").all()


def test_the_entropy_reward_counts_for_plans_and_for_no_render(tmp_path):
    """Equal rewards of .5 with gaps of 0 and 1 nat: .5 + .4 (1 - .75) and .5 - .4 (.75 - .5)."""
    rewards = torch.tensor([[[0.5, 0.5], [0.2, 0.8]]])
    keys = ["reward.grpo.ar.entropy_reward=0.4", "reward.grpo.advantage_scale=none"]
    result = RewardResult(rewards.flatten(), {"structure": rewards.flatten()}, {})
    chunk = Scored(SimpleNamespace(prompts=["a dog"], plans=range(2)), result)  # type: ignore[arg-type]
    chunk.entropies = torch.tensor([[3.0, 2.0], [3.0, 3.0]])
    assign_advantages([chunk], config_of(tmp_path, *keys), World(), 0)
    assert chunk.plan_advantages.tolist() == pytest.approx([0.1, -0.1], abs=1e-6)
    assert chunk.render_advantages.tolist() == pytest.approx([0.0, 0.0, -0.3, 0.3], abs=1e-6)


def test_best_plans_share_the_entropy_reward_whatever_the_order_of_their_renders(tmp_path):
    """1/4, 5/6 and 5/7 in two orders, which fp32 sums to two numbers; gaps of 0 and 1 nat: .4 times +-.25."""
    rewards = torch.tensor([[[1 / 4, 5 / 6, 5 / 7], [5 / 6, 5 / 7, 1 / 4]]])
    assert len(set(rewards.sum(dim=2).flatten().tolist())) == 2
    keys = ["reward.grpo.ar.entropy_reward=0.4", "reward.grpo.advantage_scale=none"]
    result = RewardResult(rewards.flatten(), {"structure": rewards.flatten()}, {})
    chunk = Scored(SimpleNamespace(prompts=["a dog"], plans=range(2)), result)  # type: ignore[arg-type]
    chunk.entropies = torch.tensor([[3.0, 2.0], [3.0, 3.0]])
    assign_advantages([chunk], config_of(tmp_path, *keys, "reward.grpo.num_samples=6"), World(), 0)
    assert chunk.plan_advantages.tolist() == pytest.approx([0.1, -0.1], abs=1e-6)


def test_each_process_takes_the_advantages_of_its_own_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(credit, "gather_tensor", lambda world, own: torch.cat([own + 5, own]))
    monkeypatch.setattr(credit, "gather_objects", lambda world, own: [own, own])
    rewards = torch.tensor([[[1.0], [4.0]], [[0.0], [2.0]]])
    keys = ["reward.grpo.advantage_clip=100", "reward.grpo.num_samples=2", "model.component=ar"]
    result = RewardResult(rewards.flatten(), {"structure": rewards.flatten()}, {})
    rollouts = [SimpleNamespace(prompts=["a dog"], plans=range(2)) for _ in range(2)]
    parts = [RewardResult(result.total[rows], {"structure": result.total[rows]}, {}) for rows in ([0, 1], [2, 3])]
    chunks = [Scored(*pair) for pair in zip(rollouts, parts, strict=True)]  # type: ignore[arg-type]
    monkeypatch.setattr(credit, "plan_render_advantages", numbered)
    assign_advantages(chunks, config_of(tmp_path, *keys), World(1, 2), 0)
    assert [chunk.plan_advantages.tolist() for chunk in chunks] == [[4.0, 5.0], [6.0, 7.0]]
    assign_advantages(chunks, config_of(tmp_path, *keys), World(0, 2), 0)
    assert [chunk.plan_advantages.tolist() for chunk in chunks] == [[0.0, 1.0], [2.0, 3.0]]


def numbered(rewards, **_):
    """Advantages that say which plan of the whole step they belong to."""
    plan = torch.arange(rewards[:, :, 0].numel(), dtype=torch.float32).view(rewards.shape[:2])
    return PlanRenderAdvantages(plan, plan[:, :, None].expand_as(rewards), torch.tensor(NAN))


def test_a_control_run_learns_from_the_same_advantages_on_other_samples(tmp_path):
    rewards = torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(0))
    rewards[0, 0] = NAN
    keys = ["reward.grpo.shuffle_advantages=true", "model.component=ar", "reward.grpo.num_samples=5"]
    plain = assigned(tmp_path, rewards, *keys[1:])[0].plan_advantages
    first, same, later = (assigned(tmp_path, rewards, *keys, step=step)[0].plan_advantages for step in (0, 0, 1))
    for shuffled in (first, later):
        assert not torch.equal(shuffled, plain) and shuffled[0] == 0
        assert torch.equal(shuffled.sort().values, plain.sort().values)
    assert torch.equal(first, same) and not torch.equal(first, later)


def test_a_sample_without_a_score_makes_no_group_uneven_and_has_no_weight_in_a_mean():
    flat = flat_groups(torch.tensor([[[-1.0, -1.0, NAN]], [[1.0, 1.0, NAN]], [[1.0, 2.0, NAN]], [[NAN] * 3]]))
    assert flat.tolist() == [True, True, False, True]
    mean = mean_of_scored(torch.tensor([1.0, NAN, 4.0]))
    assert (mean, mean.weight) == (2.5, 2.0)


def test_the_reward_weight_scales_advantages_after_their_clip(tmp_path):
    rewards = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    plain, _ = assigned(tmp_path, rewards, "reward.grpo.advantage_clip=0.5")
    scaled, _ = assigned(
        tmp_path,
        rewards,
        "reward.grpo.advantage_clip=0.5",
        "reward.ar_reward_weight=3.0",
        "reward.dit_reward_weight=0.25",
    )
    assert plain.plan_advantages.abs().max() == 0.5
    torch.testing.assert_close(scaled.plan_advantages, 3 * plain.plan_advantages)
    torch.testing.assert_close(scaled.render_advantages, 0.25 * plain.render_advantages)


def test_a_reward_weight_of_zero_leaves_the_kl(tmp_path):
    trainer = trainer_of(tmp_path, "reward.ar_reward_weight=0", "reward.dit_reward_weight=0", "reward.grpo.gate=false")
    figures = trainer.training_step()
    assert figures["ar/grad_norm"] < 1e-6 and figures["dit/grad_norm"] < 1e-6
    for part in trainer.parts.values():
        for parameter in part.parameters.values():
            parameter.data.mul_(1.1)
    trainer.step += 1
    figures = trainer.training_step()
    assert figures["ar/grad_norm"] > 1e-4 and figures["dit/grad_norm"] > 1e-7


@pytest.mark.parametrize(
    ("share", "reading"),
    [
        (0.72, "72 % of the reward's spread comes from the plan: train the AR"),
        (1.0, "100 % of the reward's spread comes from the plan: train the AR"),
        (0.0, "100 % of the reward's spread comes from the render: train the DiT"),
        (0.146, "85 % of the reward's spread comes from the render: train the DiT"),
        (0.45, "45 % of the reward's spread comes from the plan, 55 % from the render: train both"),
    ],
)
def test_the_share_reads_as_one_line(share, reading):
    assert plan_share_reading(share) == reading


def test_a_share_that_is_none_is_not_read_as_one():
    assert plan_share_reading(NAN).startswith("the plan's share of the reward's spread cannot be told")
    for wrong in (-0.01, 1.01):
        with pytest.raises(ValueError, match="share must lie in"):
            plan_share_reading(wrong)


def test_each_half_may_have_its_own_scale(tmp_path):
    rewards = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    chunk, _ = assigned(
        tmp_path, rewards, "reward.grpo.ar.advantage_scale=none", "reward.grpo.dit.advantage_scale=group"
    )
    plans = rewards.mean(2)
    torch.testing.assert_close(chunk.plan_advantages.view(2, 3), plans - plans.mean(1, keepdim=True))
    render = (rewards - rewards.mean(2, keepdim=True)) / (rewards.std(2, keepdim=True) + 1e-4)
    torch.testing.assert_close(chunk.render_advantages.view(2, 3, 2), render)
