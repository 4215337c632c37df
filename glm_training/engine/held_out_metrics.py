"""Metrics that are scored at each evaluation and never trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.data import ImageDataset
from glm_training.engine.reward_setup import reward_options
from glm_training.engine.setup import evaluated
from glm_training.rewards import RewardBatch, RewardCalculator, RewardConfigError, RewardSampleError, build_calculator
from glm_training.utils.distributed import World
from glm_training.utils.failures import tell_once


class HeldOutMetrics:
    """`reward.monitors.metrics` by name, each with a calculator of its own: one that does not apply to a prompt, or
    cannot score a picture, is left out there, and none counts in a total."""

    def __init__(self, calculators: Mapping[str, RewardCalculator]) -> None:
        self.calculators = dict(calculators)

    def scores(self, batch: RewardBatch) -> dict[str, Tensor]:
        """[B] by metric, NaN where it has no score. Raises RewardError as a calculator does."""
        has_target, has_source = batch.targets is not None, batch.sources is not None
        columns = {}
        for name, calculator in self.calculators.items():
            rows = [
                row
                for row, prompt in enumerate(batch.prompts)
                if calculator.check_prompts([prompt], has_target, has_source).applies[name]
            ]
            values = torch.full((len(batch),), torch.nan)
            if rows:
                result = calculator.compute_rewards(batch.select(rows))
                values[rows] = result.components[name]
                for reason in list(result.failures.values())[:1]:
                    tell_once(f"scoring pictures by {name}", RewardSampleError(reason), "such pictures are left out")
            columns[name] = values
        return columns


def held_out_metrics(
    config: Config, world: World, held_out: ImageDataset, trained: Collection[str] = ()
) -> HeldOutMetrics | None:
    """Those that the configuration names, their backends loaded; None without any. `trained`: names of the metrics
    beside which they are logged.

    Raises RewardConfigError where one can score none of the prompts, or is called as another one is, and
    RewardBackendError where a backend is missing.
    """
    calculators: dict[str, RewardCalculator] = {}
    prompts = [example.prompt for example in held_out.examples]
    for spec in config.reward.monitors.metrics:
        # a sample that it cannot score, or a prompt that it cannot read, is left out: nothing is trained on it
        options = replace(reward_options(config), on_error="skip")
        calculator = build_calculator(None, {spec: 1.0}, options, world.device)
        name = calculator.names[spec]
        if name in calculators or name in trained:
            raise RewardConfigError(
                f"reward.monitors.metrics: {spec} is called {name!r}, as another metric is; give its class another "
                "`name`"
            )
        calculator.check()
        if not calculator.check_prompts(prompts, held_out.has_targets, held_out.has_sources).applies[name]:
            raise RewardConfigError(
                f"reward.monitors.metrics: {spec} can score none of the {evaluated(config, 'prompt')}s; take it out, "
                "or provide the images or the quoted words that it needs"
            )
        calculators[name] = calculator
    return HeldOutMetrics(calculators) if calculators else None
