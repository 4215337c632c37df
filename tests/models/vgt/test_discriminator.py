"""The blur and the discriminator around it, by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from glm_training.models.vgt.discriminator import Blur, PatchDiscriminator


def test_blur_by_hand() -> None:
    """A dot in row 2 is weighed 1 by the window of output row 0 and 3 by that of row 1; in column 3, 3 by output column
    1 and 1 by column 2. Channels stay apart."""
    dot = torch.zeros(1, 2, 6, 6)
    dot[0, 1, 2, 3] = 64.0
    blurred = Blur()(dot)
    assert not blurred[0, 0].any()
    assert blurred[0, 1].tolist() == [[0, 3, 1], [0, 9, 3], [0, 0, 0]]


def test_odd_sides_are_rounded_up() -> None:
    """Five ones in a line, padded to (0, 1, 1, 1, 1, 1, 0, 0): sums of 7, 8 and 4 of 8 along it, and so across."""
    line = torch.tensor([7.0, 8.0, 4.0]) / 8
    torch.testing.assert_close(Blur()(torch.ones(1, 1, 5, 5))[0, 0], torch.outer(line, line))


@torch.no_grad()
def test_logits_by_hand() -> None:
    """Channels 32, 32, 64 at halved sides, 32 groups, slope 0.1, the largest value of each of 16 x 16 fields."""
    network = PatchDiscriminator(32, 2, seed=1)
    images = torch.rand(2, 3, 68, 72, generator=torch.Generator().manual_seed(0))
    hidden = F.leaky_relu(F.conv2d(images, network.first[0].weight, network.first[0].bias, padding=2), 0.1)
    for stage, width in zip(network.stages, (32, 64), strict=True):
        convolved = F.conv2d(hidden, stage[0].weight, stage[0].bias, padding=1)
        assert convolved.shape[1] == width
        hidden = F.leaky_relu(F.group_norm(Blur()(convolved), 32, stage[2].weight, stage[2].bias), 0.1)
    assert hidden.shape[2:] == (17, 18)
    pooled = F.adaptive_max_pool2d(hidden, (16, 16))
    mixed = F.leaky_relu(F.conv2d(pooled, network.logits[1].weight, network.logits[1].bias), 0.1)
    expected = F.conv2d(mixed, network.logits[3].weight, network.logits[3].bias, padding=2)
    assert expected.shape == (2, 1, 16, 16)
    torch.testing.assert_close(network(images), expected)


def test_published_sizes() -> None:
    """128, 128, 256, 512 channels: 5x5 in, three 3x3, a 1x1 and a 5x5 to one, with biases and the norms' pairs."""
    kernels = 3 * 128 * 25 + 9 * (128 * 128 + 128 * 256 + 256 * 512) + 512 * 512 + 512 * 25
    vectors = 128 + 3 * (128 + 256 + 512) + 512 + 1
    assert sum(param.numel() for param in PatchDiscriminator().parameters()) == kernels + vectors


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    left, same, other = (PatchDiscriminator(32, 1, seed=seed).first[0].weight for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(left, same) and not torch.equal(left, other)


def test_wrong_sizes_are_named() -> None:
    for channels, stages in ((48, 3), (0, 3), (32, 0)):
        with pytest.raises(ValueError, match=f"got {channels}, {stages}"):
            PatchDiscriminator(channels, stages)
