"""Aesthetic score: CLIP ViT-L/14 image embedding -> the LAION predictor ``sac+logos+ava1-l14-linearMSE``, over 10."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from glm_training.rewards.options import AestheticOptions
from glm_training.rewards.types import MetricScores, RewardBackendError, RewardBatch

MLP_FILE = "sac+logos+ava1-l14-linearMSE.pth"
MLP_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
_CHUNK = 16


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

    def check(self) -> None:
        """Load CLIP and the predictor. Raises RewardBackendError naming what to fetch and the key to set."""
        if self._predictor is None:
            problems = []
            for load in (self._mlp_path, self._load_clip):
                try:
                    load()
                except RewardBackendError as error:
                    problems.append(str(error))
            if problems:
                raise RewardBackendError("\n".join(problems))
            self._predictor = self._load_predictor(self._mlp_path())

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """One score per image."""
        self.check()
        assert self._predictor is not None
        values = []
        with torch.no_grad():
            for images in batch.images.split(_CHUNK):
                embeddings = self._clip.get_image_features(pixel_values=self._prepare(images)).pooler_output
                values.append(self._predictor(F.normalize(embeddings.float(), dim=-1)) / 10)
        return MetricScores(torch.cat(values).cpu())

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """CLIP's own preprocessing: shorter side to the input size (bicubic), centre crop, normalise."""
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        side = self._clip.config.vision_config.image_size
        images = images.to(self._device).float()
        height, width = images.shape[-2:]
        size = (side * height // min(height, width), side * width // min(height, width))  # rounds as CLIP's does: down
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        images = images[..., top : top + side, left : left + side]
        mean, std = (images.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return (images - mean) / std

    def _load_clip(self) -> None:
        from transformers import CLIPModel

        name = self._options.clip_name
        try:
            # Local files only: a cluster node without network fails at once, and ranks do not download in parallel.
            clip = CLIPModel.from_pretrained(name, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise RewardBackendError(
                f"aesthetic: CLIP model {name!r} is neither a folder nor in the local Hugging Face cache. Run "
                f"`hf download {name}`, or set reward.options.aesthetic.clip_name to a folder that holds it"
            ) from error
        self._clip = clip.requires_grad_(False).eval().to(self._device)

    def _mlp_path(self) -> Path:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / MLP_FILE
        path = Path(self._options.mlp_weights).expanduser() if self._options.mlp_weights is not None else cached
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
