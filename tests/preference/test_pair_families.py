"""Rows of encoded pairs: which image, prompt, size and draw each of them has."""

from __future__ import annotations

import pytest
import torch

from glm_training.data.preference.dataset import load_cropped, stack_rows
from glm_training.models.sdxl.types import UNetCondition
from tests.preference_runs import PROMPTS, trainer_of

DROP = torch.tensor([True, False])


def encoded(trainer, drop=None):
    """Pairs 1 and 2, in that order."""
    trainer.prepare()
    return trainer.encoder.encode(trainer.dataset.batch([1, 2]), drop)


def test_sdxl_rows_are_preferred_then_rejected_images_with_their_own_sizes(tmp_path):
    trainer = trainer_of(tmp_path, "sdxl")
    found = encoded(trainer)
    pairs = [trainer.dataset.pairs[1], trainer.dataset.pairs[2]]
    images = [pair.preferred for pair in pairs] + [pair.rejected for pair in pairs]
    for row, image in enumerate(images):
        pixels = stack_rows([load_cropped(image, 64, 64)]).pixels
        torch.testing.assert_close(found.clean[row], trainer.family.unet.encode_images(pixels)[0], atol=1e-5, rtol=1e-5)
    assert isinstance(found.condition, UNetCondition)
    # 64 x 72 px files, cut in the middle to 64 x 64
    assert found.condition.time_ids.tolist() == [[64, 72, 0, 4, 64, 64]] * 4
    text = trainer.family.unet.encode_prompts(PROMPTS[1:3])
    torch.testing.assert_close(found.condition.text.prompt_embeds, text.prompt_embeds.repeat(2, 1, 1))
    torch.testing.assert_close(found.condition.text.pooled, text.pooled.repeat(2, 1))


@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_prompt_is_zeros_or_the_empty_prompt(tmp_path, zeros):
    """What the model's own guidance leads away from; the other prompt stays."""
    trainer = trainer_of(tmp_path, "sdxl", "dpo.prompt_dropout=0.5")
    trainer.family.unet.force_zeros_for_empty_prompt = zeros
    text = encoded(trainer, DROP).condition.text
    kept = trainer.family.unet.encode_prompts([PROMPTS[2], ""])
    for found, own in ((text.prompt_embeds, kept.prompt_embeds), (text.pooled, kept.pooled)):
        for row in (1, 3):
            torch.testing.assert_close(found[row], own[0])
        for row in (0, 2):
            torch.testing.assert_close(found[row], torch.zeros_like(own[1]) if zeros else own[1])


def test_glm_rows_have_the_tokens_of_their_image_and_the_prompt_of_their_pair(tmp_path):
    trainer = trainer_of(tmp_path, "glm_image", "dpo.prompt_dropout=0.5")
    found = encoded(trainer, DROP)
    pairs = [trainer.dataset.pairs[1], trainer.dataset.pairs[2]]
    images = [pair.preferred for pair in pairs] + [pair.rejected for pair in pairs]
    ar, dit = trainer.family.ar, trainer.family.dit
    prompts = ar.encode_prompts(PROMPTS[1:3], 64, 64)
    for row, image in enumerate(images):
        pixels = stack_rows([load_cropped(image, 64, 64)]).pixels
        tokens = ar.targets(pixels, prompts.select(torch.tensor([row % 2])))[0]
        assert torch.equal(found.tokens[row], tokens)
        assert torch.equal(found.condition.prior_tokens[row], tokens[prompts.preview_length :])
        torch.testing.assert_close(found.clean[row], dit.encode_images(pixels)[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(found.prompt.input_ids[row], prompts.input_ids[row % 2])
    assert found.condition.dropped.tolist() == [True, False, True, False]
    own = dit.condition([PROMPTS[2]], found.condition.prior_tokens[1:2], (2, 2))
    length = int(own.glyph_mask.sum())
    for row in (1, 3):
        assert int(found.condition.glyph_mask[row].sum()) == length > 1, 'the quoted word is "CAFE"'
        torch.testing.assert_close(found.condition.glyph[row, :length], own.glyph[0, :length])
