"""Samples without a score (`reward.on_error: skip`): the loss, its KL and its figures are those of the others alone."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from glm_training.engine.parts import Part
from glm_training.methods.ar_policy_gradient import ARPolicyGradient
from glm_training.models.glm_image.ar_types import ARRollout
from glm_training.reinforcement.credit import Scored
from glm_training.reinforcement.updates import Learning, update_ar
from glm_training.rewards import RewardResult
from glm_training.utils.distributed import World
from tests.engine.test_parts import SGD
from tests.methods.toys import prompt_of
from tests.reinforcement.test_reward_steps import CHUNKED, step_of, table
from tests.runs import config_of

NAN = math.nan


def partly(prompt: int, place: int) -> float:
    """Of six renders (three plans of two): prompt 0 has no score for renders 1, 2, 3, so that its plan 1 has none."""
    return NAN if prompt == 0 and place in (1, 2, 3) else table(prompt, place)


@pytest.mark.parametrize("micro", ["null", "2"])
@pytest.mark.parametrize("updates", [1, 3])
def test_an_update_follows_the_mean_over_its_rows_that_have_a_score(tmp_path, updates, micro):
    keys = [f"reward.grpo.updates_per_rollout={updates}", f"rollout.micro_batch_size={micro}"]
    keys += ["reward.grpo.num_samples=6", "reward.on_error=skip"]
    seen, figures, _ = step_of(tmp_path, {"structure": partly}, *CHUNKED, *keys)
    scored = {"ar": [0, 2, 100, 101, 102], "dit": [0, 4, 5, *range(100, 106)]}
    places = {"ar": [0, 2, 3, 4, 5], "dit": [0, 4, 5, *range(6, 12)]}  # of these rows in the step
    for name in ("ar", "dit"):
        rows = dict(zip(places[name], scored[name], strict=True))
        shares = [[number for row, number in rows.items() if row % updates == update] for update in range(updates)]
        assert seen.gradients[name] == pytest.approx([sum(share) / len(share) for share in shares], rel=1e-5), name
        assert figures[f"{name}/number"] == pytest.approx(sum(scored[name]) / len(scored[name]), rel=1e-5)
    assert figures["reward/skipped_samples"] == 3


def test_an_update_without_any_scored_row_moves_nothing(tmp_path):
    """Six plans of one prompt in six updates: those of plans 1, 2 and 3 are left out."""
    keys = ["reward.grpo.updates_per_rollout=6", "reward.grpo.num_samples=6", "reward.on_error=skip"]
    seen, _, _ = step_of(tmp_path, {"structure": partly}, "training.batch_size=1", "model.component=ar", *keys)
    assert seen.gradients["ar"] == pytest.approx([0.0, 4.0, 5.0])


class ToyTokens(nn.Module):
    """Every token of row r has the log-prob weight * (number of the row)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, prompt, tokens, **options):
        return self.weight * tokens.float()


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_the_loss_and_its_kl_in_closed_form(tmp_path, aggregation):
    """At weight 0 all ratios are 1 and the reference's log-probs, at weight -1, are -n for the row of number n. With
    D = -n - weight n, the gradient of -A ratio + beta (exp(D) - D - 1) is -A n - beta n (exp(-n) - 1); the mean counts
    rows 1 and 3 of four."""
    toy = ToyTokens()
    part = Part("ar", toy, dict(toy.named_parameters()), SGD, World(), total_steps=1)
    config = config_of(tmp_path, "model.component=ar", f"reward.grpo.loss_aggregation={aggregation}")
    numbers, advantages = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.25, 7.0, -1.0, 7.0])
    rewards = torch.tensor([1.0, NAN, 2.0, NAN])
    rollout = SimpleNamespace(
        prompts=["a dog"],
        plans=ARRollout(prompt_of(4), numbers[:, None].repeat(1, 6), torch.zeros(4, 6), None, 1),
    )
    chunk = Scored(rollout, RewardResult(rewards, {}, {}), plan_advantages=advantages)  # type: ignore[arg-type]

    @contextmanager
    def reference():
        toy.weight.data.fill_(-1.0)
        yield
        toy.weight.data.zero_()

    def update(part: Part) -> dict[str, float]:
        return {"gradient": toy.weight.grad.item()}

    part.reference = reference
    settings = SimpleNamespace(micro_batch_size=3, plans=4)
    run = Learning(config, World(), {"ar": part}, settings, 0, nullcontext, lambda: None, update)  # type: ignore[arg-type]
    method = ARPolicyGradient((0.2, 0.2), kl_coef=0.5, aggregation=aggregation)
    figures = update_ar(run, method, [chunk])
    rows = [(1.0, 0.25), (0.5, -1.0)]
    expected = sum(-a * n - 0.5 * n * (math.exp(-n) - 1) for n, a in rows) / 2
    assert figures["ar/gradient"] == pytest.approx(expected, rel=1e-5)
    assert figures["ar/kl"] == pytest.approx(sum(math.exp(-n) + n - 1 for n, _ in rows) / 2, rel=1e-5)
    assert figures["ar/loss"] == pytest.approx(sum(-a + 0.5 * (math.exp(-n) + n - 1) for n, a in rows) / 2, rel=1e-5)
