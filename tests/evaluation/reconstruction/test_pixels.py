"""PSNR and SSIM against hand-worked values and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from glm_training.evaluation.reconstruction.pixels import mean_squared_error, psnr, resized, similarities, squashed

EPS = torch.finfo(torch.float64).eps


def pictures(count=3, height=20, width=31):
    """Smooth ones of 8 bits, and the same with noise."""
    draw = torch.Generator().manual_seed(0)
    plain = torch.rand(count, 3, 4, 5, generator=draw)
    plain = torch.nn.functional.interpolate(plain, size=(height, width), mode="bilinear")
    noisy = (plain + 0.1 * torch.randn(plain.shape, generator=draw)).clamp(0, 1)
    return ((images * 255).round() / 255 for images in (plain, noisy))


def as_array(image):
    return image.permute(1, 2, 0).double().numpy()


def test_psnr_by_hand():
    black, grey = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1, dtype=torch.float64)
    error = mean_squared_error(grey, black).item()
    assert psnr(error) == pytest.approx(20, abs=1e-12)  # error 0.01
    one_pixel = black.clone()
    one_pixel[0, 0, 0, 0] = 1
    assert mean_squared_error(one_pixel, black).item() == pytest.approx(1 / 12, abs=EPS)
    assert psnr(1.0) == 0 and psnr(0.0) == math.inf
    with pytest.raises(ValueError, match="two sizes"):
        mean_squared_error(black, torch.zeros(1, 3, 2, 3))


def test_psnr_and_ssim_are_scikit_images():
    plain, noisy = pictures()
    errors, (own, published) = mean_squared_error(noisy, plain), similarities(noisy, plain)
    for row in range(len(plain)):
        reference, image = as_array(plain[row]), as_array(noisy[row])
        assert psnr(errors[row].item()) == pytest.approx(
            peak_signal_noise_ratio(reference, image, data_range=1), abs=1e-9
        )
        for value, data_range in ((own[row], 1), (published[row], 2)):
            expected = structural_similarity(reference, image, data_range=data_range, channel_axis=-1)
            assert value.item() == pytest.approx(expected, abs=1e-9)
    assert (published > own).all()  # the published reading is the larger one


def test_identical_pictures():
    plain, _ = pictures()
    own, published = similarities(plain, plain)
    assert mean_squared_error(plain, plain).tolist() == [0, 0, 0]
    assert own.tolist() == published.tolist() == [1, 1, 1]


def test_ssim_of_flat_pictures_by_hand():
    """Without contrast, (2 xy + c1) / (x^2 + y^2 + c1) is left, with c1 = (0.01 R)^2."""
    dark, light = torch.full((1, 3, 8, 8), 0.2), torch.full((1, 3, 8, 8), 0.4)
    own, published = similarities(dark, light)
    assert own.item() == pytest.approx((0.16 + 1e-4) / (0.2 + 1e-4), rel=1e-6)
    assert published.item() == pytest.approx((0.16 + 4e-4) / (0.2 + 4e-4), rel=1e-6)


def test_a_picture_is_squashed_whatever_its_shape():
    wide = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0], [255, 0, 0], [0, 0, 0]]] * 2, dtype=np.uint8))
    image = squashed(wide, 2)
    assert image.shape == (1, 3, 2, 2) and image.dtype == torch.float32
    # two pixels under each half, a black and a red one, weighed by how near they are to its middle and its neighbour's
    assert image[0, 0, 0, 0].item() == pytest.approx(image[0, 0, 1, 1].item()) and not image[0, 1:].any()
    assert 0.5 < image[0, 0, 0, 0].item() < 0.7
    assert torch.equal(squashed(Image.new("L", (3, 5), 51), 4), torch.full((1, 3, 4, 4), 0.2))


def test_resizing_is_bilinear_between_the_nearest_four():
    row = torch.arange(4.0).repeat(4, 1)[None, None].expand(1, 3, 4, 4) / 3
    # the middles of two pixels of four lie between 0 | 1 and 2 | 3
    torch.testing.assert_close(resized(row, 2)[0, 0], torch.tensor([[0.5, 2.5]] * 2) / 3)
    assert resized(row, 4) is row
