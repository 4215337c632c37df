"""Every term of the autoencoder's loss and the discriminator's by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from glm_training.methods.autoencoding import Autoencoding, AutoencodingWeights, gaussian_kl
from glm_training.models.vgt.autoencoder import Posterior, Reconstruction

IMAGES = torch.full((2, 3, 4, 4), 0.5)


def reconstruction(
    value: float = 0.75, features: torch.Tensor | None = None, posterior: Posterior | None = None
) -> Reconstruction:
    """All pixels `value`: the squared error against IMAGES is (value - 0.5) ** 2."""
    images = torch.full((2, 3, 4, 4), value, requires_grad=True)
    return Reconstruction(
        images, torch.zeros(2, 4, 1, 1), torch.zeros(2, 1, 3) if features is None else features, posterior
    )


def distance(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[B] means of images - 2 * others: which is which tells."""
    return (images - 2 * others).mean((1, 2, 3))


def logits(images: torch.Tensor) -> torch.Tensor:
    """[B, 2]."""
    mean = images.mean((1, 2, 3))
    return torch.stack([4 * mean, -8 * mean], dim=1)


class Judge(nn.Module):
    """A discriminator of one weight: logits [B, 1, 1, 1] = weight * mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weight * images.mean((1, 2, 3), keepdim=True)


def test_pixels_alone() -> None:
    output = reconstruction()
    term = Autoencoding(AutoencodingWeights(reconstruction=3.0)).loss(output, IMAGES)
    assert term.loss.item() == 3 * 0.0625 and term.rows == 2
    assert {name: value.item() for name, value in term.metrics.items()} == {"mse": 0.0625}
    term.loss.backward()
    torch.testing.assert_close(output.images.grad, torch.full((2, 3, 4, 4), 3 * 2 * 0.25 / 96))


def test_all_terms_with_the_published_weights() -> None:
    """Squared error 1/16, LPIPS .75 - 1, logits apart by (1, 2), features by 2, KL of one latent of mean 2, D at 3."""
    features = torch.full((2, 1, 3), 5.0, requires_grad=True)
    posterior = Posterior(torch.zeros(2, 4, 1, 1), torch.zeros(2, 4, 1, 1))
    posterior.mean[1, 0] = 2.0
    method, judge = Autoencoding(AutoencodingWeights(), distance, logits), Judge()
    output = reconstruction(features=features, posterior=posterior)
    term = method.loss(output, IMAGES, teacher_features=torch.full((2, 1, 3), 3.0), discriminator=judge)
    told = {name: value.item() for name, value in term.metrics.items()}
    assert told == {
        "mse": 0.0625, "lpips": -0.25, "classes": 2.5, "distillation": 4.0, "kl": 1.0, "adversarial": -3.0,
    }  # fmt: skip
    expected = 0.0625 + (-0.25 + 0.1 * 2.5) + 1.0 * 4.0 + 1e-6 * 1.0 + 0.1 * -3.0
    assert term.loss.item() == pytest.approx(expected, abs=1e-6)
    term.loss.backward()
    assert features.grad.unique().item() == pytest.approx(2 * 2 / 6), "2 * difference / elements"
    # per pixel: 2 * .25 / 96 of the squares, 1 / 96 of LPIPS, .1 * (2 * 1 * 4 + 2 * 2 * 8) / 4 / 48 of the logits,
    # and -.1 * 4 / 96 of the discriminator
    slope = 0.5 / 96 + 1 / 96 + 0.1 * 40 / 4 / 48 - 0.4 / 96
    torch.testing.assert_close(output.images.grad, torch.full((2, 3, 4, 4), slope))
    assert judge.weight.grad is None and judge.weight.requires_grad


def test_stage_two_and_a_missing_network() -> None:
    """The one network that is there has the whole perceptual weight."""
    weights = AutoencodingWeights(distillation=0.1)
    output = reconstruction(features=torch.full((2, 1, 3), 5.0))
    wanted = torch.full((2, 1, 3), 3.0)
    only_lpips = Autoencoding(weights, lpips=distance).loss(output, IMAGES, teacher_features=wanted)
    assert only_lpips.loss.item() == pytest.approx(0.0625 + 1.1 * -0.25 + 0.1 * 4, abs=1e-6)
    only_logits = Autoencoding(weights, classes=logits).loss(output, IMAGES)
    assert only_logits.loss.item() == pytest.approx(0.0625 + 1.1 * 2.5, abs=1e-6)
    shared = AutoencodingWeights(perceptual=2.0, lpips=1.0, classes=3.0)
    both = Autoencoding(shared, distance, logits).loss(output, IMAGES)
    assert both.loss.item() == pytest.approx(0.0625 + 2.0 * (-0.25 + 3 * 2.5) / 4, abs=1e-6)


def test_kl_by_hand() -> None:
    """(mean^2 + variance - 1 - log variance) / 2 summed: of (1, ln 4) and (-2, 0), of two standard normals."""
    mean = torch.tensor([[1.0, -2.0], [0.0, 0.0]])[:, :, None, None]
    log_variance = torch.tensor([[math.log(4), 0.0], [0.0, 0.0]])[:, :, None, None]
    found = gaussian_kl(Posterior(mean, log_variance))
    torch.testing.assert_close(found, torch.tensor([(1 + 4 - 1 - math.log(4)) / 2 + 2, 0.0]))


def test_terms_are_fp32_under_autocast() -> None:
    """bf16 would round 0.5 + 2 ** -10 to 0.5, and the features' difference of 1 + 3 * 2 ** -9."""
    output = reconstruction(0.5 + 2**-10, features=torch.full((2, 1, 3), 1 + 2**-7).bfloat16())
    wanted = torch.full((2, 1, 3), 2**-9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        term = Autoencoding(AutoencodingWeights()).loss(output, IMAGES, teacher_features=wanted)
        judged = Autoencoding(AutoencodingWeights()).discriminator_loss(
            nn.Conv2d(3, 1, 1), output.images, IMAGES, torch.zeros(2)
        )
    assert term.metrics["mse"].item() == 2**-20 and term.metrics["distillation"].item() == (1 + 3 * 2**-9) ** 2
    assert term.loss.dtype == judged.loss.dtype == torch.float32
    assert judged.metrics["real_logits"] != judged.metrics["fake_logits"]


def test_discriminator_by_hand() -> None:
    """Real 2, fake 3: hinge (0 + 4) / 2, LeCam (2 - -1)^2 + relu(1 - 3)^2."""
    output, judge = reconstruction(), Judge()
    method = Autoencoding(AutoencodingWeights(lecam=0.5))
    averages = torch.tensor([1.0, -1.0])
    term = method.discriminator_loss(judge, output.images, IMAGES, averages)
    told = {name: value.item() for name, value in term.metrics.items()}
    assert told == {"hinge": 2.0, "lecam": 9.0, "real_logits": 2.0, "fake_logits": 3.0}
    assert term.loss.item() == 2 + 0.5 * 9 and term.rows == 2
    term.loss.backward()
    assert judge.weight.grad.item() == 0.75 / 2 + 0.5 * 2 * 3 * 0.5, "slope of the fakes, and of the reals' penalty"
    assert output.images.grad is None
    assert averages.tolist() == [1.0, -1.0], "the caller moves them on"


def test_parts_of_a_step_are_the_whole() -> None:
    """Two halves that know the means of the step, their losses averaged, have the loss and slope of the whole batch."""
    method, averages = Autoencoding(AutoencodingWeights(lecam=0.5)), torch.tensor([3.0, 0.5])
    fakes = torch.tensor([0.1, 0.9])[:, None, None, None].expand(2, 3, 4, 4)
    reals = torch.tensor([0.2, 0.8])[:, None, None, None].expand(2, 3, 4, 4)
    whole, parts = Judge(), Judge()
    expected = method.discriminator_loss(whole, fakes, reals, averages)
    expected.loss.backward()
    means = torch.tensor([2.0, 2.0])
    losses = []
    for row in (0, 1):
        term = method.discriminator_loss(
            parts, fakes[row : row + 1], reals[row : row + 1], averages, step_means=lambda own: means
        )
        assert [term.metrics[name].item() for name in ("real_logits", "fake_logits")] == [2.0, 2.0]
        losses.append(term.loss)
    torch.stack(losses).mean().backward()
    assert torch.stack(losses).mean().item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert parts.weight.grad.item() == pytest.approx(whole.weight.grad.item(), abs=1e-6)
