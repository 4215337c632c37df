"""LPIPS similarity: 1 - LPIPS(AlexNet) between the generated and the target image (Zhang et al., 2018, version 0.1).

The linear heads ship in the ``lpips`` package. The AlexNet backbone is read from the torch hub cache, to which a run
fetches it before, or from a path.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from glm_training.rewards.options import LpipsOptions
from glm_training.rewards.types import MetricScores, RewardBackendError, RewardBatch
from glm_training.utils.downloads import AddressFile
from glm_training.utils.hub_files import Wanted
from glm_training.utils.writable import expanded

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_MIN_SIDE = 64
_CHUNK = 8
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def _alexnet_features() -> nn.Sequential:
    """The convolutions of torchvision's AlexNet up to the last ReLU, same names. Built without drawing weights."""
    with torch.device("meta"):
        return nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )


class Lpips(nn.Module):
    """LPIPS distance with an AlexNet backbone.

    backbone: state dict of torchvision's AlexNet (``features.*`` is used). heads: the lpips package's
    ``weights/v0.1/alex.pth``. Raises KeyError or RuntimeError when a state dict is of something else.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, backbone: Mapping[str, torch.Tensor], heads: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = _alexnet_features()
        prefix = "features."
        own = {name.removeprefix(prefix): value for name, value in backbone.items() if name.startswith(prefix)}
        self.features.load_state_dict({name: value.float() for name, value in own.items()}, assign=True)
        self.heads = nn.ParameterList(
            nn.Parameter(heads[f"lin{level}.model.1.weight"].float().flatten()) for level in range(5)
        )
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None])
        self.requires_grad_(False).eval()

    def levels(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] in [0, 1] -> the five ReLU outputs [B, C, h, w], each normalised over channels."""
        if min(images.shape[-2:]) < _MIN_SIDE:
            factor = _MIN_SIDE / min(images.shape[-2:])
            images = F.interpolate(images, scale_factor=factor, mode="bilinear", align_corners=False)
        hidden = (2 * images - 1 - self.shift) / self.scale
        outputs = []
        for layer in self.features:
            hidden = layer(hidden)
            if isinstance(layer, nn.ReLU):
                outputs.append(hidden / (hidden.square().sum(dim=1, keepdim=True).sqrt() + 1e-10))
        return outputs

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """[B] distances between two [B, 3, H, W] batches in [0, 1]; 0 means identical features."""
        distance = images.new_zeros(len(images))
        for head, left, right in zip(self.heads, self.levels(images), self.levels(others), strict=True):
            distance = distance + torch.einsum("bchw,c->bhw", (left - right).square(), head).mean(dim=(1, 2))
        return distance


class LpipsSimilarity:
    """1 - LPIPS against the target. 1 for identical images; typically in [0, 1] and not clamped, so that very different
    images (LPIPS slightly above 1) still rank."""

    needs = "a target image"

    def __init__(self, options: LpipsOptions, device: torch.device) -> None:
        self._weights = options.backbone_weights
        self._device = device
        self._model: Lpips | None = None

    def wanted(self) -> list[Wanted]:
        """The AlexNet of torch hub."""
        if self._weights is not None:
            return []
        return [AddressFile("lpips", ALEXNET_URL, _cached(), ALEXNET_URL.rpartition("-")[2].removesuffix(".pth"))]

    def check(self) -> None:
        """Load the network. Raises RewardBackendError naming the file to fetch and the key to set."""
        if self._model is None:
            heads = torch.load(_heads_path(), map_location="cpu", weights_only=True)
            self._model = self._load(self._backbone_path(), heads).to(self._device)

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """True when there is a target image."""
        return has_target

    def score(self, batch: RewardBatch) -> MetricScores:
        """1 - LPIPS of each image with its target. Raises ValueError when the two sizes differ."""
        self.check()
        assert self._model is not None and batch.targets is not None  # applies() holds for every sample of the batch
        if batch.images.shape != batch.targets.shape:
            raise ValueError(f"lpips: images {list(batch.images.shape)} and targets {list(batch.targets.shape)} differ")
        values = []
        with torch.no_grad():
            for images, targets in zip(batch.images.split(_CHUNK), batch.targets.split(_CHUNK), strict=True):
                values.append(1 - self._model(images.to(self._device).float(), targets.to(self._device).float()))
        return MetricScores(torch.cat(values).cpu())

    def _backbone_path(self) -> Path:
        cached = _cached()
        path = expanded(self._weights) if self._weights is not None else cached
        if not path.is_file():
            raise RewardBackendError(
                f"lpips: AlexNet weights not found at {path}. Download {ALEXNET_URL} and save it as {cached}, or set "
                f"reward.options.lpips.backbone_weights to where {cached.name} lies"
            )
        return path

    @staticmethod
    def _load(path: Path, heads: Mapping[str, torch.Tensor]) -> Lpips:
        try:
            return Lpips(torch.load(path, map_location="cpu", weights_only=True), heads)
        except (AttributeError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
            raise RewardBackendError(
                f"lpips: {path} is not a state dict of torchvision's AlexNet ({first}). Download {ALEXNET_URL} anew "
                "and check reward.options.lpips.backbone_weights"
            ) from error


def _cached() -> Path:
    """Where torch hub keeps the AlexNet."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_URL.rpartition("/")[2]


def _heads_path() -> Path:
    """The linear heads inside the installed lpips package, found without importing it."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise RewardBackendError("lpips: the Python package is missing; run `pip install lpips`")
    return Path(package.origin).parent / "weights" / "v0.1" / "alex.pth"
