"""Structure: SSIM against the source image (i2i) or the target."""

from __future__ import annotations

import torch

from glm_training.rewards.options import StructureOptions
from glm_training.rewards.types import MetricScores, RewardBatch
from glm_training.utils.hub_files import Wanted

WINDOW = 7
_CHUNK = 2
"""Pairs at once: in fp64 they are large, and what fits the cache is quickest."""


def ssim(images: torch.Tensor, references: torch.Tensor, data_range: float = 1.0) -> torch.Tensor:
    """Structural similarity per image pair, in [-1, 1]; 1 means identical.

    images, references: [B, 3, H, W] in [0, 1], H and W >= 7. Returns [B] fp64. Equals
    ``skimage.metrics.structural_similarity(..., data_range=1, channel_axis=...)`` at its defaults: uniform 7x7 window,
    sample covariance, K = (0.01, 0.03), mean over channels and over the windows that lie inside the image (Wang 2004).
    Another `data_range` than the pictures' own is for comparison with figures that were computed so. Raises ValueError
    when the sizes differ or an image is smaller than the window.
    """
    if images.shape != references.shape or min(images.shape[-2:]) < WINDOW:
        raise ValueError(
            f"structure: SSIM needs two equal sizes of at least {WINDOW}x{WINDOW}, "
            f"got {list(images.shape)} and {list(references.shape)}"
        )
    x, y = images.double(), references.double()  # E[x^2] - E[x]^2 loses too much in fp32
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def mean(values: torch.Tensor) -> torch.Tensor:
        return _window_sums(_window_sums(values, -1), -2) / WINDOW**2

    mean_x, mean_y = mean(x), mean(y)
    var_x = unbiased * (mean(x * x) - mean_x**2)
    var_y = unbiased * (mean(y * y) - mean_y**2)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean(dim=(1, 2, 3))


def _window_sums(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums of `WINDOW` = 7 neighbours along `dim`, as 4 + 2 + 1 of doubled and redoubled ones: four additions."""
    size = values.shape[dim] - WINDOW + 1
    twos = values.narrow(dim, 0, size + 5) + values.narrow(dim, 1, size + 5)
    fours = twos.narrow(dim, 0, size) + twos.narrow(dim, 2, size)
    return fours + twos.narrow(dim, 4, size) + values.narrow(dim, 6, size)


class Structure:
    """SSIM against the reference image, in [-1, 1]."""

    def __init__(self, options: StructureOptions, device: torch.device) -> None:
        self._reference = options.reference
        self._device = device

    @property
    def needs(self) -> str:
        """The image that samples must have."""
        return {"source": "a source image", "target": "a target image", None: "a source or a target image"}[
            self._reference
        ]

    def wanted(self) -> list[Wanted]:
        """Nothing."""
        return []

    def check(self) -> None:
        """Nothing to load."""

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when the sample has its reference image."""
        return {"source": has_source, "target": has_target, None: has_source or has_target}[self._reference]

    def score(self, batch: RewardBatch) -> MetricScores:
        """SSIM of each image with its reference."""
        use_source = self._reference == "source" or (self._reference is None and batch.sources is not None)
        references = batch.sources if use_source else batch.targets
        assert references is not None  # applies() holds for every sample of the batch
        pairs = zip(batch.images.split(_CHUNK), references.split(_CHUNK), strict=True)
        values = [ssim(images.to(self._device), others.to(self._device)) for images, others in pairs]
        return MetricScores(torch.cat(values).float().cpu())
