"""Drawing with the family: which prompt, noise and order each image has, and how many latents are written at once."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.family import DECODED_AT_ONCE, Sampling
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.loading import Models
from glm_training.models.vgt.sampling import sample
from glm_training.models.vgt.sequence import random_orders
from glm_training.models.vgt.tiny_autoencoder import tiny_random_autoencoder
from glm_training.models.vgt.tiny_generator import tiny_random_generator
from glm_training.utils.randomness import normal

PROMPTS, SEED, STEPS, GUIDANCE, PARALLEL = ["a red circle", "two blue squares"], 7, 2, 2.0, 4


def test_each_sample_has_the_prompt_the_noise_and_the_order_of_its_name() -> None:
    """32 px are 4 x 4 latents of 4 channels. An untrained head draws the same for all texts: this one hears them."""
    autoencoder, generator = tiny_random_autoencoder(1), tiny_random_generator(seed=1)
    random = torch.Generator().manual_seed(0)
    for layer in (generator.condition_out, generator.head.modulation, generator.head.out):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=random)
    family = VGT(Models(autoencoder, generator=generator))
    calls: list[int] = []
    generator.llm.register_forward_hook(lambda *_: calls.append(1))
    sampling = Sampling(1.0, 1.0, True, STEPS, GUIDANCE, PARALLEL)
    drawn = family.draw(PROMPTS, height=32, width=32, seed=SEED, sampling=sampling, samples=2, prompt_ids=[5, 9])
    assert len(calls) == 16 // PARALLEL
    expected = []
    for prompt, number in zip(PROMPTS, (5, 9), strict=True):
        for name in ([(number, 0)], [(number, 1)]):
            noise = normal(SEED, "generate/latents", name, (STEPS, 4, 4, 4))
            order = random_orders(SEED, "generate/order", name, 16)
            latents = sample(
                generator, generator.encode_prompts([prompt]), noise, order, guidance=GUIDANCE, acc_ratio=PARALLEL
            )
            with torch.no_grad():
                expected.append(autoencoder.decode(latents)[0].clamp(0, 1))
    other = family.draw(PROMPTS[1:], height=32, width=32, seed=SEED, sampling=sampling, prompt_ids=[5])
    assert (other[0] - drawn[0]).abs().max() > 1e-2  # the prompt counts
    assert min((a - b).abs().max() for i, a in enumerate(expected) for b in expected[:i]) > 1e-2
    torch.testing.assert_close(drawn, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("generates", [True, False])
def test_pictures_go_through_the_autoencoder_a_few_at_a_time_and_are_the_same(monkeypatch, generates: bool) -> None:
    autoencoder = tiny_random_autoencoder(1)
    family = VGT(Models(autoencoder, generator=tiny_random_generator(seed=1) if generates else None))
    seen: list[tuple[str, int]] = []
    for name in ("encode", "decode"):
        monkeypatch.setattr(autoencoder, name, _counting(getattr(autoencoder, name), name, seen))
    sources = None if generates else torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    options = {"height": 32, "width": 32, "seed": SEED, "samples": 2, "sources": sources}
    sampling = Sampling(1.0, 1.0, True, STEPS, GUIDANCE, PARALLEL)
    together = family.draw(PROMPTS, sampling=sampling, **options)
    once = [("encode", 4)] * (not generates) + [("decode", 4)]
    assert seen == once, "no more than there are"
    seen.clear()
    monkeypatch.setitem(DECODED_AT_ONCE, "vgt", 3)
    steps: list[int] = []
    parted = family.draw(PROMPTS, sampling=sampling, on_step=lambda: steps.append(1), **options)
    assert seen == [step for count in (3, 1) for step in [("encode", count)] * (not generates) + [("decode", count)]]
    assert len(steps) == 2 + (16 // PARALLEL - 1 if generates else 0), "latents are written all at once"
    torch.testing.assert_close(parted, together, rtol=0, atol=1e-5)


def _counting(call, name: str, seen: list[tuple[str, int]]):
    def counted(pictures):
        seen.append((name, len(pictures)))
        return call(pictures)

    return counted


def test_a_size_that_the_generator_has_no_places_for_is_told_in_pixels() -> None:
    """8 x 8 queries of 8 px."""
    family = VGT(Models(tiny_random_autoencoder(1), generator=tiny_random_generator(seed=1)))
    sampling = Sampling(1.0, 1.0, True, STEPS, GUIDANCE, PARALLEL)
    with pytest.raises(ValueError, match="128 x 64 px: this generator has places for 64 x 64 px at most"):
        family.draw(PROMPTS, height=128, width=64, seed=SEED, sampling=sampling)
