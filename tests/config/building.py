"""Configurations from a few sections, and what is wrong between their keys."""

from __future__ import annotations

from typing import Any

from glm_training.config import Config
from glm_training.config.checks.cross_field import cross_field_issues
from glm_training.config.errors import Issue

TEXT_REWARD: dict[str, Any] = {"metrics": {"text_accuracy": 1.0}}


def build(**sections: Any) -> Config:
    return Config.model_validate({"reward": TEXT_REWARD, **sections})


def issues(**sections: Any) -> list[Issue]:
    found = cross_field_issues(build(**sections))
    assert found
    return found


def first_paths(**sections: Any) -> list[str]:
    return [issue.paths[0] for issue in issues(**sections)]


def reward(**grpo: Any) -> dict[str, Any]:
    return {**TEXT_REWARD, "grpo": grpo}
