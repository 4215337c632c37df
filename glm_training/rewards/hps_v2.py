"""HPSv2.1 (Wu et al., 2023, arXiv:2306.09341): open_clip's ViT-H-14 trained on human preferences."""

from __future__ import annotations

import torch

from glm_training.rewards.clip import pad_square
from glm_training.rewards.open_clip_model import Checkpoint, OpenClipModel
from glm_training.rewards.options import HpsV2Options
from glm_training.rewards.types import MetricScores, RewardBatch
from glm_training.utils.hub_files import Wanted

HPS_V2 = Checkpoint(
    "hps_v2",
    "xswu/HPSv2",
    "HPS_v2.1_compressed.pt",
    "reward.options.hps_v2.weights",
    "reward.options.hps_v2.architecture",
)


class HpsV2:
    """cos(image, prompt) of HPSv2.1: about 0.2 to 0.35. Applies to every sample; prompts are cut at 77 tokens.

    As in its own package the picture is not cropped: it is fitted into the square with black borders.
    """

    needs = "nothing"

    def __init__(self, options: HpsV2Options, device: torch.device) -> None:
        self._model = OpenClipModel(HPS_V2, options.weights, options.architecture, device)

    def wanted(self) -> list[Wanted]:
        """The checkpoint, where no file of one is given."""
        return self._model.wanted()

    def check(self) -> None:
        """Load the model. Raises RewardBackendError naming the extra to install, or what to fetch and the key."""
        self._model.load()

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """One cosine per sample."""
        with torch.no_grad():
            images = self._model.image_embeddings(batch.images, pad_square)
        return MetricScores((images * self._model.text_embeddings(batch.prompts)).sum(dim=-1).cpu())
