"""Perceptual networks from files of random weights, against the formulas of their papers on torchvision's layers."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from torchvision.models import convnext_small, vgg16

from glm_training.models.perceptual import ConvNextLogits, LpipsVgg

LEFT, RIGHT = torch.rand(2, 2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def random_features() -> dict[str, torch.Tensor]:
    """Of VGG-16, large enough that a picture is still seen in the last layer."""
    with torch.device("meta"):
        features = vgg16(weights=None).features
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * (2 / max(1, value[0].numel())) ** 0.5
        if value.ndim == 4
        else 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in features.state_dict().items()
    }


@torch.no_grad()
def test_lpips_by_its_formula(tmp_path) -> None:
    """At five layers: features of unit length, squared differences weighed by the heads, mean over places; summed."""
    state = random_features()
    torch.save({f"features.{name}": value for name, value in state.items()}, tmp_path / "vgg.pth")
    network = LpipsVgg(tmp_path / "vgg.pth").train()
    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", map_location="cpu", weights_only=True
    )
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    hidden = (2 * torch.cat([LEFT, RIGHT]) - 1 - shift[:, None, None]) / scale[:, None, None]
    expected = torch.zeros(2)
    with torch.device("meta"):
        layers = vgg16(weights=None).features
    for place, layer in enumerate(layers):
        if f"{place}.weight" in state:
            hidden = F.conv2d(hidden, state[f"{place}.weight"], state[f"{place}.bias"], padding=1)
        else:
            hidden = F.relu(hidden) if isinstance(layer, torch.nn.ReLU) else F.max_pool2d(hidden, 2)
        if place in (3, 8, 15, 22, 29):
            left, right = (hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            head = heads[f"lin{(3, 8, 15, 22, 29).index(place)}.model.1.weight"]
            expected += F.conv2d((left - right).square(), head).mean((1, 2, 3))
    assert expected.min() > 0.05
    torch.testing.assert_close(network(LEFT, RIGHT), expected, atol=1e-5, rtol=1e-4)
    assert network(LEFT, LEFT).tolist() == [0, 0]


def test_lpips_passes_gradients_to_pictures_alone(tmp_path) -> None:
    torch.save({f"features.{name}": value.half() for name, value in random_features().items()}, tmp_path / "vgg.pth")
    network, images = LpipsVgg(tmp_path / "vgg.pth"), LEFT.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distances = network(images, RIGHT)
    assert distances.shape == (2,) and distances.dtype == torch.float32
    distances.sum().backward()
    assert images.grad.abs().min(0).values.max() > 0
    assert not any(param.requires_grad for param in network.parameters())


def test_a_file_of_another_network_is_named(tmp_path) -> None:
    torch.save(
        {"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(3)}, tmp_path / "other.pth"
    )
    with pytest.raises(ValueError, match=r"25 of the 26 weights .* first 0\.bias\. Download https"):
        LpipsVgg(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit the ConvNeXt"):
        ConvNextLogits(tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        ConvNextLogits(tmp_path / "nowhere.pth")


def test_convnext_logits_are_torchvisions_on_squashed_pictures(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        stock = convnext_small(weights=None)
    stock.to_empty(device="cpu").eval()
    with torch.no_grad():
        for param in stock.parameters():
            scale = 1 / max(1, param[0].numel()) ** 0.5 if param.ndim > 1 else 1
            param.uniform_(-scale, scale, generator=generator)
    torch.save(stock.state_dict(), tmp_path / "convnext.pth")
    network = ConvNextLogits(tmp_path / "convnext.pth").train()
    images = torch.rand(1, 3, 500, 300, generator=generator).requires_grad_()
    small = F.interpolate(images.detach(), size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = stock((small - mean[:, None, None]) / std[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
    assert logits.dtype == torch.float32 and expected.std() > 0.01
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    logits.sum().backward()
    assert images.grad.any() and not any(param.requires_grad for param in network.parameters())
