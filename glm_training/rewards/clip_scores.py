"""What a CLIP says of image and prompt: CLIPScore and PickScore. Both apply to every sample, and cut the prompt at the
model's 77 tokens, so that the end of a long one does not count."""

from __future__ import annotations

import torch

from glm_training.rewards.clip import ClipPair
from glm_training.rewards.options import ClipScoreOptions, PickScoreOptions
from glm_training.rewards.types import MetricScores, RewardBatch
from glm_training.utils.hub_files import Wanted

PICK_SCALE = 26.0
"""Brings the usual PickScores, 18 to 24, near 0.7 to 0.9."""


class ClipScore:
    """cos(image, prompt), in [-1, 1], about 0.1 to 0.35 in practice (Hessel et al., 2021, without its factor 2.5)."""

    needs = "nothing"

    def __init__(self, options: ClipScoreOptions, device: torch.device) -> None:
        name = (options.clip_name, "clip_score.clip_name")
        self._pair = ClipPair("clip_score", name, name, device)

    def wanted(self) -> list[Wanted]:
        """The model and its tokenizer."""
        return self._pair.wanted()

    def check(self) -> None:
        """Load the model and its tokenizer. Raises RewardBackendError naming what to fetch and the key to set."""
        self._pair.load()

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """One cosine per sample."""
        return MetricScores(self._pair.cosines(batch.images, batch.prompts))


class PickScore:
    """exp(logit_scale) x cos(image, prompt) / 26: about 0.7 to 0.9. The model is a CLIP ViT-H/14 trained on human
    preferences (Kirstain et al., 2023, arXiv:2305.01569)."""

    needs = "nothing"

    def __init__(self, options: PickScoreOptions, device: torch.device) -> None:
        self._pair = ClipPair(
            "pick_score",
            (options.model_name, "pick_score.model_name"),
            (options.processor_name, "pick_score.processor_name"),
            device,
        )

    def wanted(self) -> list[Wanted]:
        """The model and its tokenizer."""
        return self._pair.wanted()

    def check(self) -> None:
        """Load the model and its tokenizer. Raises RewardBackendError naming what to fetch and the key to set."""
        self._pair.load()

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """One score per sample."""
        clip, _ = self._pair.load()
        return MetricScores(
            clip.logit_scale.exp().item() * self._pair.cosines(batch.images, batch.prompts) / PICK_SCALE
        )
