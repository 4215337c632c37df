"""Who draws what: names of the noise, groups, tiles, and what is remembered of a model."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from glm_training.evaluation.suites.drawing import (
    Drawing,
    check_prompts,
    drawer,
    fingerprint,
    tiled,
    tiles,
)
from glm_training.evaluation.suites.protocol import EvaluationError, Picture
from glm_training.models.family import Sampling
from glm_training.models.prompt_reading import PromptReading

DRAWING = Drawing(4, 6, 7, Sampling(0.9, 0.75, True, 3, 1.5))


class Family:
    """Draws a picture whose red says which of all the names of noise it was given, in the order of their appearance."""

    def __init__(self) -> None:
        self.names: list[tuple[int, str, int]] = []

    def draw(self, prompts, *, height, width, seed, sampling, prompt_ids, micro_batch_size):
        assert (height, width, sampling, micro_batch_size) == (4, 6, DRAWING.sampling, len(prompts))
        rows = []
        for prompt, name in zip(prompts, prompt_ids, strict=True):
            if (seed, prompt, name) not in self.names:
                self.names.append((seed, prompt, name))
            rows.append(torch.full((3, height, width), self.names.index((seed, prompt, name)) / 255))
        return torch.stack(rows)

    def read_prompts(self, prompts, height, width, mode):
        return [PromptReading(("it is too long", "Shorten it") if len(p) > 9 else None) for p in prompts]


def reds(images: list[Image.Image]) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in images]


def test_noise_is_named_by_prompt_and_sample_whatever_is_drawn_beside_or_how_many_samples_there_are():
    family = Family()
    make = drawer(family, DRAWING)
    one = [Picture(f"{i}.png", f"prompt {i}", i) for i in range(3)]
    three = [Picture(f"{i}-{s}.png", f"prompt {i}", i, (s,)) for i in range(3) for s in range(3)]
    assert reds(make(one)) == [0, 1, 2]
    assert reds(make(three)) == [0, 3, 4, 1, 5, 6, 2, 7, 8]
    assert reds(make(three[4:6])) == [5, 6] and reds(make(three[::-1])) == [8, 7, 2, 6, 5, 1, 4, 3, 0]
    assert len({name for _, _, name in family.names}) == 9 and {seed for seed, _, _ in family.names} == {7}


def test_samples_of_one_picture_are_its_tiles():
    (grid,) = drawer(Family(), DRAWING)([Picture("a.png", "a", 0, (0, 1, 2, 3))])
    assert grid.size == (12, 8) and reds(tiles(grid)) == [0, 1, 2, 3]
    assert grid.getpixel((6, 0))[0] == 1 and grid.getpixel((0, 4))[0] == 2


def test_nine_tiles_go_row_by_row_and_others_are_no_grid():
    images = [Image.new("RGB", (3, 2), (level, 0, 0)) for level in range(9)]
    assert reds(tiles(tiled(images), side=3)) == list(range(9))
    with pytest.raises(ValueError, match="5 x 4 px is no grid of 2 x 2"):
        tiles(Image.new("RGB", (5, 4)))
    with pytest.raises(ValueError, match="3 pictures are no square"):
        tiled(images[:3])


def test_all_that_decides_a_picture_stands_in_the_settings():
    sampling = {
        "temperature": 0.9, "top_p": 0.75, "do_sample": True, "num_inference_steps": 3, "guidance_scale": 1.5,
        "parallel": 1,
    }  # fmt: skip
    assert DRAWING.settings() == {"height": 4, "width": 6, "seed": 7, "sampling": sampling}


def test_what_is_not_read_of_a_prompt_is_told_once():
    asked = []

    class Reader:
        def read_prompts(self, prompts, *size):
            asked.append((list(prompts), *size))
            return [PromptReading(cut=None if prompt == "a" else "the last word is not read") for prompt in prompts]

    pictures = [Picture(f"{i}.png", prompt, i) for i, prompt in enumerate(["a", "long", "a", "long"])]
    assert check_prompts(Reader(), pictures, DRAWING) == ["'long': the last word is not read"]
    assert asked == [(["a", "long"], 4, 6, "t2i")]


def test_prompts_that_a_model_cannot_draw_are_all_named():
    pictures = [Picture(f"{i}.png", prompt, i) for i, prompt in enumerate(["short", "much too long", "also too long"])]
    with pytest.raises(EvaluationError) as raised:
        check_prompts(Family(), pictures, DRAWING)
    assert "'much too long': it is too long. Shorten it" in str(raised.value) and "also too long" in str(raised.value)


def test_a_model_of_other_weights_has_another_fingerprint(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = tmp_path / "unet/model.safetensors"
    data = bytearray(400_000)
    weights.write_bytes(data)
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("notes")
    assert fingerprint(tmp_path) == first
    for place in (0, 200_000, 399_999):
        changed = bytearray(data)
        changed[place] = 1
        weights.write_bytes(changed)
        assert fingerprint(tmp_path) != first
    weights.write_bytes(data + b"\0")
    assert fingerprint(tmp_path) != first
    assert fingerprint(tmp_path / "none") is None
