"""What is told of a run's rewards besides their figures: samples without a score, and steps that teach nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from glm_training.reinforcement.credit import Scored
from glm_training.rewards import RewardError
from glm_training.rewards.foreign import shown
from glm_training.utils.distributed import World, gather_objects
from glm_training.utils.words import counted

FLAT_STEPS = 5
"""After so many steps in a row without any spread in the rewards, the user is told."""

REASONS = 5
"""How many kinds of reasons for missing scores a run tells."""


class MissingScores:
    """Tells why samples were left out (`reward.on_error: skip`): the first reason, and others as they come."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._told: set[str] = set()
        self._lines: list[str] = []

    def look(self, step: int, chunks: Sequence[Scored], figures: Mapping[str, float]) -> None:
        """Looks at training step `step` with its `figures`. Raises RewardError, on all processes, when not one of its
        samples has a score: it can teach nothing, and a step of weight decay is no training."""
        if not figures["reward/skipped_samples"]:
            return
        samples = sum(len(chunk.result.total) for chunk in chunks)
        everywhere = gather_objects(self._world, (samples, _first_reason(chunks)))
        total = sum(count for count, _ in everywhere)
        missing = int(figures["reward/skipped_samples"])
        reason = next((reason for _, reason in everywhere if reason is not None), "of them gave no reason")
        if missing == total:
            raise RewardError(
                f"not one of the {counted(total, 'sample')} of step {step} has a score (reward.on_error: skip leaves "
                f"such samples out), so that there is nothing to learn from. The first, {reason}"
            )
        kind = re.sub(r"\d+", "#", reason.partition(": ")[2])
        if kind not in self._told and len(self._told) < REASONS:
            self._told.add(kind)
            self._lines.append(
                f"without a score: {missing} of the {counted(total, 'sample')} of step {step}, left out as "
                f"reward.on_error: skip says. The first, {reason}. Later ones count in reward/skipped_samples of "
                "metrics.jsonl"
            )

    def read(self) -> list[str]:
        """What there is to tell since the last call."""
        lines, self._lines = self._lines, []
        return lines


def _first_reason(chunks: Sequence[Scored]) -> str | None:
    """The first sample of this process without a score, and why; None where all have one."""
    for chunk in chunks:
        group = len(chunk.result.total) // len(chunk.rollout.prompts)
        for row, reason in sorted(chunk.result.failures.items()):
            return f"of the prompt {shown(chunk.rollout.prompts[row // group], 80)!r}: {reason}"
    return None


class FlatSteps:
    """Tells once that step after step all rewards of each prompt are equal, and what helps."""

    def __init__(self) -> None:
        self._flat = 0
        self._seen = 0
        self._told = False

    def look(self, prompts: int, figures: Mapping[str, float]) -> None:
        """Looks at the `figures` of a step of so many prompts, over all processes."""
        self._seen += 1
        self._flat = self._flat + 1 if figures["reward/zero_spread_groups"] == prompts else 0

    def read(self, *, last: bool) -> list[str]:
        """What there is to tell; `last`: the run ends here, and may have been too short for a row of steps."""
        if self._told or not self._flat or not (self._flat == FLAT_STEPS or last and self._flat == self._seen):
            return []
        self._told = True
        steps = f"{self._flat} steps in a row" if self._flat > 1 else "the only step"
        return [
            f"in {steps} all rewards of each prompt were equal, so that nothing was learned from them. Look at the "
            "samples and at reward/* in metrics.jsonl. Where pictures differ and their rewards do not, take a metric "
            "with finer steps, or easier prompts; where the pictures do not differ, more of them "
            "(reward.grpo.num_samples) or more noise (rollout.temperature, rollout.eta). "
            "reward.grpo.max_resamples draws other prompts in place of such ones"
        ]

    def state(self) -> list[int]:
        """What it has counted, for a checkpoint."""
        return [self._flat, self._seen, int(self._told)]

    def load(self, state: Sequence[int]) -> None:
        """Takes what `state` gave."""
        self._flat, self._seen, self._told = state[0], state[1], bool(state[2])
