"""Rewards: scoring generated images against prompts, targets and sources."""

from glm_training.rewards.custom import score_batch
from glm_training.rewards.differentiable import DifferentiableScorers
from glm_training.rewards.ocr import read_texts
from glm_training.rewards.options import (
    AestheticOptions,
    ClipHOptions,
    ClipScoreOptions,
    DifferentiableOptions,
    HpsV2Options,
    LpipsOptions,
    ObjectsOptions,
    PickScoreOptions,
    RemoteOptions,
    RewardOptions,
    StructureOptions,
    TextAccuracyOptions,
)
from glm_training.rewards.quoted_text import quoted_text
from glm_training.rewards.reward_calculator import PromptReport, RewardCalculator, build_calculator
from glm_training.rewards.text_accuracy import word_accuracy
from glm_training.rewards.types import (
    RewardBackendError,
    RewardBatch,
    RewardConfigError,
    RewardError,
    RewardResult,
    RewardSampleError,
    RewardServiceError,
    ScoringStopped,
    weighted_total,
)

__all__ = [
    "AestheticOptions",
    "ClipHOptions",
    "ClipScoreOptions",
    "DifferentiableOptions",
    "DifferentiableScorers",
    "HpsV2Options",
    "LpipsOptions",
    "ObjectsOptions",
    "PickScoreOptions",
    "PromptReport",
    "RemoteOptions",
    "RewardBackendError",
    "RewardBatch",
    "RewardCalculator",
    "RewardConfigError",
    "RewardError",
    "RewardOptions",
    "RewardResult",
    "RewardSampleError",
    "RewardServiceError",
    "ScoringStopped",
    "StructureOptions",
    "TextAccuracyOptions",
    "build_calculator",
    "quoted_text",
    "read_texts",
    "score_batch",
    "weighted_total",
    "word_accuracy",
]
