"""Configurations from a few sections, and what is wrong between their keys."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from glm_training.config import Config
from glm_training.config.loading.errors import CrossFieldError, Issue

TEXT_REWARD: dict[str, Any] = {"metrics": {"text_accuracy": 1.0}}


def build(**sections: Any) -> Config:
    return Config.model_validate({"reward": TEXT_REWARD, **sections})


def issues(**sections: Any) -> list[Issue]:
    with pytest.raises(ValidationError) as caught:
        build(**sections)
    causes = [detail["ctx"]["error"] for detail in caught.value.errors()]
    assert len(causes) == 1 and isinstance(causes[0], CrossFieldError)
    return causes[0].issues


def first_paths(**sections: Any) -> list[str]:
    return [issue.paths[0] for issue in issues(**sections)]


def reward(**grpo: Any) -> dict[str, Any]:
    return {**TEXT_REWARD, "grpo": grpo}
