"""Metrics that are only looked at: whose score is whose, and what has none."""

from types import SimpleNamespace
from typing import Any

import torch

from glm_training.engine.held_out_metrics import HeldOutMetrics
from glm_training.rewards import RewardBatch


class Length:
    """The number of letters of a prompt; applies to prompts with a quotation alone."""

    def check_prompts(self, prompts: list[str], has_target: bool, has_source: bool) -> Any:
        assert has_target and not has_source
        return SimpleNamespace(applies={"length": sum('"' in prompt for prompt in prompts)})

    def compute_rewards(self, batch: RewardBatch) -> Any:
        values = torch.tensor([float(len(prompt)) for prompt in batch.prompts])
        return SimpleNamespace(components={"length": values}, failures={})


def test_a_score_stands_at_its_prompt_and_what_does_not_apply_has_none() -> None:
    prompts = ["plain", '"a"', "plain too", '"abc"']
    pictures = torch.zeros(4, 3, 2, 2)
    found = HeldOutMetrics({"length": Length()}).scores(RewardBatch(pictures, prompts, targets=pictures))  # type: ignore[dict-item]
    torch.testing.assert_close(
        found["length"], torch.tensor([torch.nan, 3.0, torch.nan, 5.0]), equal_nan=True, rtol=0, atol=0
    )
