"""Aesthetic score: CLIP ViT-L/14 image embedding -> the LAION predictor ``sac+logos+ava1-l14-linearMSE``, over 10."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glm_training.rewards.clip import clip_files, image_embeddings, load_clip
from glm_training.rewards.options import AestheticOptions
from glm_training.rewards.types import MetricScores, RewardBackendError, RewardBatch, load_all
from glm_training.utils.downloads import AddressFile
from glm_training.utils.hub_files import Wanted
from glm_training.utils.writable import expanded

MLP_FILE = "sac+logos+ava1-l14-linearMSE.pth"
MLP_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
MLP_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class AestheticPredictor(nn.Module):
    """width -> 1024 -> 128 -> 64 -> 16 -> 1, linear with dropout; ``layers.*`` are named as in the published file.

    Takes L2-normalised CLIP embeddings [B, width] (768 for ViT-L/14); gives scores [B], about 1 to 10.
    """

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[B, width] -> [B]."""
        return self.layers(embeddings).squeeze(-1)


class Aesthetic:
    """LAION aesthetic score / 10: about 0.1 to 1, photographs people like near 0.6. Applies to every sample."""

    needs = "nothing"

    def __init__(self, options: AestheticOptions, device: torch.device) -> None:
        self._options = options
        self._device = device
        self._clip: Any = None
        self._predictor: AestheticPredictor | None = None

    def wanted(self) -> list[Wanted]:
        """CLIP, and the predictor where no file of one is given."""
        predictor = AddressFile("aesthetic", MLP_URL, _cached(), MLP_SHA256)
        own = [] if self._options.mlp_weights is not None else [predictor]
        return [*own, *clip_files(self._options.clip_name, "aesthetic")]

    def check(self) -> None:
        """Load CLIP and the predictor. Raises RewardBackendError naming what to fetch and the key to set."""
        if self._predictor is None:
            path, _ = load_all((self._mlp_path, self._load_clip))
            self._predictor = self._load_predictor(path)

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """One score per image."""
        self.check()
        assert self._predictor is not None
        with torch.no_grad():
            scores = self._predictor(image_embeddings(self._clip, batch.images)) / 10
        return MetricScores(scores.cpu())

    def _load_clip(self) -> None:
        self._clip = load_clip(self._options.clip_name, "aesthetic", "aesthetic.clip_name", self._device)

    def _mlp_path(self) -> Path:
        cached = _cached()
        path = expanded(self._options.mlp_weights) if self._options.mlp_weights is not None else cached
        if not path.is_file():
            raise RewardBackendError(
                f"aesthetic: predictor weights not found at {path}. Download {MLP_URL} and save it as {cached}, or set "
                f"reward.options.aesthetic.mlp_weights to where {MLP_FILE} lies"
            )
        return path

    def _load_predictor(self, path: Path) -> AestheticPredictor:
        with torch.device("meta"):  # no weights are drawn: all of them are assigned below
            predictor = AestheticPredictor(self._clip.config.projection_dim)
        try:
            predictor.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except (AttributeError, EOFError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise RewardBackendError(
                f"aesthetic: {path} does not fit the predictor for CLIP {self._options.clip_name!r} ({error}). "
                f"Download {MLP_URL} anew and check reward.options.aesthetic.mlp_weights"
            ) from error
        return predictor.float().requires_grad_(False).eval().to(self._device)


def _cached() -> Path:
    """Beside torch hub's files."""
    return Path(torch.hub.get_dir()) / "checkpoints" / MLP_FILE
