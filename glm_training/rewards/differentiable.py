"""Rewards with a gradient to the images: ReFL (arXiv:2304.05977) and SRPO (arXiv:2509.06942), as DMDR uses them.

``clip_h`` is DFN5B-CLIP-ViT-H-14 (arXiv:2309.17425) on the prompt itself. ``hps_v2`` is HPSv2.1; ReFL may put positive
words before its prompt, and SRPO scores with the difference of two texts in place of one,

    f = (k + 1) f(positive words + prompt) - f(negative words + prompt),   score = <f(image), f>.

As in the code published with SRPO, and in DMDR's, the features are of unit length and f is not: what the two texts
share counts k times, so that the score of SRPO is no cosine and lies near 0 for a small k. There the words are drawn at
random from short lists; here they are fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glm_training.algorithms.distillation import reward_hinge, srpo_text_feature
from glm_training.rewards.clip import pad_square, squash_square
from glm_training.rewards.hps_v2 import HPS_V2
from glm_training.rewards.open_clip_model import Checkpoint, OpenClipModel, Preprocess
from glm_training.rewards.options import DifferentiableOptions
from glm_training.rewards.types import RewardBatch, load_all
from glm_training.utils.hub_files import Wanted

CLIP_H = Checkpoint(
    "clip_h",
    "apple/DFN5B-CLIP-ViT-H-14",
    "open_clip_pytorch_model.bin",
    "dmdr.reward.clip_h_weights",
    "dmdr.reward.clip_h_architecture",
)


class DifferentiableScorers:
    """Frozen scorers of images and prompts on ``device``, in fp32 or under the caller's autocast."""

    def __init__(self, options: DifferentiableOptions, device: torch.device) -> None:
        self._options = options
        clip_h, hps_v2 = options.clip_h, options.hps_v2
        known: dict[str, tuple[OpenClipModel, Preprocess]] = {
            "clip_h": (OpenClipModel(CLIP_H, clip_h.weights, clip_h.architecture, device), squash_square),
            "hps_v2": (OpenClipModel(HPS_V2, hps_v2.weights, hps_v2.architecture, device), pad_square),
        }
        self._scorers = {name: known[name] for name in options.weights}

    def wanted(self) -> list[Wanted]:
        """The checkpoints of which no file is given."""
        return [file for model, _ in self._scorers.values() for file in model.wanted()]

    def check(self) -> None:
        """Load the models. Raises one RewardBackendError naming all that must be installed, fetched or set."""
        load_all(model.load for model, _ in self._scorers.values())

    def losses(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the scorers of weight * mean relu(threshold - score), 0-dim fp32; and the mean score of each.

        images: [B, 3, H, W] float in [0, 1]; the loss has a gradient with respect to them. prompts: B strings; what
        exceeds 77 tokens with the words before it is cut. The mean scores are 0-dim, detached, by scorer. Raises
        ValueError for sizes that disagree, RewardBackendError like ``check``.
        """
        loss = torch.zeros((), device=images.device)
        figures = {}
        for name, scores in self._each(RewardBatch(images, list(prompts))).items():
            hinge = reward_hinge(scores, self._options.threshold, check_finite=False)
            loss = loss + self._options.weights[name] * hinge
            figures[name] = scores.detach().mean()
        return loss, figures

    @torch.no_grad()
    def scores(self, batch: RewardBatch) -> dict[str, Tensor]:
        """The score [B] of each picture by `score_<scorer>`, as a training step logs their means."""
        return {f"score_{name}": scores for name, scores in self._each(batch).items()}

    def _each(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Scores [B] by scorer."""
        self.check()
        found = {}
        for name, (model, preprocess) in self._scorers.items():
            texts = self._text_features(name, model, batch.prompts)
            found[name] = (model.image_embeddings(batch.images, preprocess) * texts).sum(dim=-1).to(batch.images.device)
        return found

    def _text_features(self, name: str, model: OpenClipModel, prompts: list[str]) -> Tensor:
        options = self._options
        if name == "clip_h":
            return model.text_embeddings(prompts)
        positive = model.text_embeddings([_after(options.positive_words, prompt) for prompt in prompts])
        if options.method == "refl":
            return positive
        negative = model.text_embeddings([_after(options.negative_words, prompt) for prompt in prompts])
        return srpo_text_feature(positive, negative, options.strength, check_finite=False)


def _after(words: str, prompt: str) -> str:
    return f"{words} {prompt}" if words else prompt
