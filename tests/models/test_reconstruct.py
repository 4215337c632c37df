"""What an image comes back as from each family's autoencoder, against the stock classes."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.glm_image.family import GLMImage
from glm_training.models.sdxl.family import SDXL
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import Source


def images(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [GLMImage, SDXL])
def test_a_vae_gives_back_the_picture_of_its_likeliest_latents(kind):
    family = kind.load("tiny-random")
    vae = family.dit.vae if kind is GLMImage else family.unet.vae
    own = family.reconstruct(images(64))
    with torch.no_grad():
        stock = vae.decode(vae.encode(2 * images(64) - 1).latent_dist.mode()).sample
    assert own.shape == (2, 3, 64, 64) and not own.requires_grad
    # normalising latents and undoing it rounds them
    torch.testing.assert_close(own, (stock / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_a_vgt_gives_back_what_its_autoencoder_decodes():
    family = VGT.load("tiny-random", source=Source(component="autoencoder"))
    side = family.own_size()
    own = family.reconstruct(images(side))
    with torch.no_grad():
        expected = family.autoencoder(images(side)).images
    assert own.min() >= 0 and own.max() <= 1 and not own.requires_grad
    assert torch.equal(own, expected.clamp(0, 1))
