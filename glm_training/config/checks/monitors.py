"""Monitors that cannot be meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue
from glm_training.config.sections.reward_options import METRICS

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def monitor_issues(config: Config, is_metric: Callable[[str], bool]) -> Iterator[Issue]:
    """Held-out metrics that are none (`is_metric` knows them), that are trained on, or that nothing would score."""
    key, names = "reward.monitors.metrics", config.reward.monitors.metrics
    trained = config.reward.metric_names() if config.reward.calculator is None else set()
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield Issue((key,), f"the metric `{name}` is listed twice.")
        if not is_metric(name):
            own = "one of your own is written `module:Class` or `path/to/file.py:Class`"
            yield Issue((key,), f"`{name}` is no metric.", f"Known are {', '.join(METRICS)}; {own}.")
        elif name in trained:
            yield Issue(
                (key, "reward.metrics", "reward.weights"),
                f"`{name}` is trained on, so it cannot tell whether the reward is hacked.",
                "Take it out of one of the two.",
            )
    if names and not (config.evaluation.enabled and config.reward.enabled):
        yield Issue(
            (key, "evaluation.enabled", "reward.enabled"),
            "these metrics are scored in evaluations, and there are none.",
            "Set `evaluation.enabled: true`, or remove the metrics.",
        )
