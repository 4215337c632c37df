"""How `sample` draws with each model, and which file each picture is in."""

from __future__ import annotations

import argparse

import pytest
import torch
from PIL import Image

from glm_training.cli import sample as command
from glm_training.cli.drawing_model import Choice, family_of
from glm_training.models.family import FewSteps
from glm_training.models.glm_image.family import GLMImage


def drawn(tmp_path, monkeypatch, *, few_steps=None, **options):
    """What the tiny random model is asked to draw; sample s of prompt p is a picture of grey (16 p + s) / 255."""
    family, asked = GLMImage.load("tiny-random"), {}
    family.few_steps = few_steps

    def draw(prompts, *, samples, **given):
        asked.update(given, prompts=prompts, samples=samples)
        greys = [(16 * p + s) / 255 for p in range(len(prompts)) for s in range(samples)]
        return torch.tensor(greys).view(-1, 1, 1, 1).repeat(1, 3, 8, 8)

    monkeypatch.setattr(family, "draw", draw)
    monkeypatch.setattr(Choice, "load", lambda choice: family)
    given = {
        "prompt": ["a cat", "a dog"], "prompts": None, "source": [], "plans": None, "renders": None,
        "model": "tiny-random", "family": None, "lora": [], "samples": 1,
        "out": str(tmp_path / "out"), "height": None, "width": None, "steps": None, "guidance": None, "parallel": None,
        "temperature": 0.8, "top_p": 0.6, "seed": 5, "dtype": None,
    }  # fmt: skip
    assert command.sample(argparse.Namespace(**(given | options))) == 0
    return asked, {path.name: Image.open(path).getpixel((0, 0))[0] for path in (tmp_path / "out").glob("[0-9]*.png")}


def test_a_picture_is_named_by_its_prompt_and_its_sample(tmp_path, monkeypatch):
    _, pictures = drawn(tmp_path, monkeypatch, samples=3)
    assert pictures == {f"{p}-{s}.png": 16 * p + s for p in (0, 1) for s in (0, 1, 2)}
    _, pictures = drawn(tmp_path, monkeypatch, seed=6)
    assert {name: pictures[name] for name in ("2-0.png", "3-0.png")} == {"2-0.png": 0, "3-0.png": 16}
    assert len(pictures) == 8, "nothing was written over"


@pytest.mark.parametrize(
    ("few_steps", "options", "steps", "guidance"),
    [
        (None, {}, 50, 1.5),
        (None, {"steps": 7, "guidance": 3.0}, 7, 3.0),
        (FewSteps(4), {}, 4, 1.0),
        (FewSteps(4), {"steps": 2, "guidance": 2.0}, 2, 2.0),
    ],
)
def test_distilled_models_draw_in_their_own_steps_without_guidance(
    tmp_path, monkeypatch, few_steps, options, steps, guidance
):
    asked, _ = drawn(tmp_path, monkeypatch, few_steps=few_steps, samples=2, **options)
    sampling = asked["sampling"]
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (steps, guidance)
    assert (sampling.temperature, sampling.top_p, sampling.do_sample) == (0.8, 0.6, True)
    assert (asked["seed"], asked["samples"], asked["prompts"]) == (5, 2, ["a cat", "a dog"])


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ('{"_class_name": "StableDiffusionXLPipeline"}', "sdxl"),
        ('{"_class_name": "StableDiffusionXLImg2ImgPipeline"}', "sdxl"),
        ('{"_class_name": "GlmImagePipeline"}', "glm_image"),
        ("{", "glm_image"),
    ],
)
def test_a_folder_says_which_family_it_is(tmp_path, text, family):
    (tmp_path / "model_index.json").write_text(text)
    assert family_of(str(tmp_path)) == family
    assert family_of("tiny") == "glm_image"
