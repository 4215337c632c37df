"""Networks that compare pictures as people do, from files of weights: LPIPS on VGG-16, and ConvNeXt's class logits.

Neither is shipped: the user names the files. Pictures are [B, 3, H, W] in [0, 1]; both networks are frozen, in
evaluation mode and fp32, and pass gradients on to the pictures.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_training.models.weights import load_weights, read_weights

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
CONVNEXT_URL = "https://download.pytorch.org/models/convnext_small-0c510722.pth"
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class LpipsVgg(nn.Module):
    """LPIPS 0.1 on VGG-16 (arXiv:1801.03924): 0 for the same picture. The linear heads ship in the `lpips` package.

    weights: torchvision's VGG-16 (`VGG_URL`), whose `features.*` are used; None for a network on the meta device,
    without any. Raises FileNotFoundError, or ValueError for a file that does not fit.
    """

    def __init__(self, weights: Path | None) -> None:
        import lpips

        super().__init__()
        # 138 million weights of which the file gives those that count; `lpips` speaks to an older torchvision
        with torch.device("meta"), warnings.catch_warnings(action="ignore", category=UserWarning):
            self.network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        if weights is not None:
            heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
            state = {name: value.float() for name, value in read_weights(heads).items()}
            self.network.load_state_dict({**state, **self._backbone(weights)}, strict=False, assign=True)
        self.requires_grad_(False).eval()

    def _backbone(self, weights: Path) -> dict[str, Tensor]:
        """The file's `features.N.*` by the names that `lpips` gives them, `net.sliceK.N.*`."""
        saved, wanted = read_weights(weights), self.network.net.state_dict()
        found = {name: saved.get("features." + name.partition(".")[2]) for name in wanted}
        fitting = {
            f"net.{name}": value.float()
            for name, value in found.items()
            if value is not None and value.shape == wanted[name].shape
        }
        unfit = [name.partition(".")[2] for name in wanted if f"net.{name}" not in fitting]
        if unfit:
            raise ValueError(
                f"{weights} is not torchvision's VGG-16: {len(unfit)} of the {len(wanted)} weights of its `features` "
                f"are missing or of another size, first {unfit[0]}. Download {VGG_URL}"
            )
        return fitting

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """[B] distances."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(2 * images.float() - 1, 2 * others.float() - 1).flatten()

    def train(self, mode: bool = True) -> LpipsVgg:
        return super().train(False)


class ConvNextLogits(nn.Module):
    """Logits of ConvNeXt-S over ImageNet's classes, of pictures squashed to 224 x 224 px.

    weights: torchvision's ConvNeXt-Small (`CONVNEXT_URL`); None for a network on the meta device, without any. Raises
    FileNotFoundError, or ValueError for a file that does not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path | None) -> None:
        from torchvision.models import convnext_small

        super().__init__()
        with torch.device("meta"):
            network = convnext_small(weights=None)
        self.network = network
        if weights is not None:
            load_weights(network.to_empty(device="cpu"), weights)
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1000]."""
        with torch.autocast(images.device.type, enabled=False):
            small = F.interpolate(images.float(), size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
            return self.network((small - self.mean) / self.std)

    def train(self, mode: bool = True) -> ConvNextLogits:
        return super().train(False)
