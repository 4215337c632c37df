"""A checkpoint's folder is taken for the pipeline or adapter in it; of a run's, the one to name is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from glm_training.models.family import FewSteps
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.loading import ModelLoadError
from glm_training.models.run_folders import pipeline_in
from glm_training.models.sdxl.family import SDXL
from glm_training.models.weights import load_weights


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with two whole checkpoints and one of adapters."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-000001", "step-000002"):
        (checkpoints / name / "pipeline" / "unet").mkdir(parents=True)
        (checkpoints / name / "pipeline" / "model_index.json").write_text("{}")
        (checkpoints / name / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").write_text("")
    (checkpoints / "step-000003" / "lora_dit").mkdir(parents=True)
    (checkpoints / "step-000003" / "lora_dit" / "adapter_config.json").write_text("{}")
    return tmp_path / "run"


def test_a_checkpoint_is_taken_for_its_pipeline(run):
    step = run / "checkpoints" / "step-000001"
    assert pipeline_in(step) == pipeline_in(step / "pipeline") == str(step / "pipeline")


@pytest.mark.parametrize("pointer", ["latest", "best"])
def test_a_training_may_not_begin_with_what_a_pointer_names(run, pointer):
    """What it goes on from would be another one when it is resumed."""
    (run / "checkpoints" / pointer).write_text("step-000002\nand more\n")
    for name in (run / "checkpoints" / pointer, run / "checkpoints" / pointer / "pipeline"):
        with pytest.raises(
            ModelLoadError, match=r"another checkpoint after each save: name .*step-000002(/pipeline)?,"
        ):
            pipeline_in(name)


@pytest.mark.parametrize("name", ["tiny", "owner/name", "./nowhere"])
def test_what_is_no_folder_stays(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert pipeline_in(name) == name


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_of_a_run_the_newest_pipeline_is_named(run, where):
    with pytest.raises(ModelLoadError, match="name one of its checkpoints, the newest is .*/step-000002$"):
        pipeline_in(run / where)
    (run / "checkpoints" / "latest").write_text("step-000001\n")
    with pytest.raises(ModelLoadError, match="^--model .* the newest is .*/step-000001$"):
        pipeline_in(run / where, "--model")


def test_checkpoints_that_lie_elsewhere_are_found(run, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"checkpoints": str(run / "checkpoints")}))
    with pytest.raises(ModelLoadError, match="the newest is .*/run/checkpoints/step-000002$"):
        pipeline_in(tmp_path / "other")


def test_a_part_and_adapters_alone_are_told_from_a_pipeline(run):
    step = run / "checkpoints" / "step-000001" / "pipeline"
    with pytest.raises(ModelLoadError, match=f"one part of a pipeline: name {step}$"):
        pipeline_in(step / "unet")
    adapters = run / "checkpoints" / "step-000003"
    with pytest.raises(ModelLoadError, match=f"--lora dit={adapters}/lora_dit$"):
        pipeline_in(adapters)


@pytest.mark.parametrize("given", ["run", "run/checkpoints/step-000002", "run/checkpoints/step-000002/pipeline/unet"])
def test_a_folder_in_place_of_a_file_of_weights_names_the_file(run, tmp_path, given):
    named = "name a file like .*step-000002/pipeline/unet/diffusion_pytorch_model.safetensors$"
    with pytest.raises(FileNotFoundError, match=named):
        load_weights(nn.Linear(1, 1), tmp_path / given)


@pytest.mark.parametrize("family", [GLMImage, SDXL])
def test_families_load_from_a_checkpoint(tmp_path, family):
    saved = family.load("tiny-random", seed=5)
    saved.draw_in_few_steps(FewSteps(2, None))
    saved.save_pretrained(tmp_path / "step-000007" / "pipeline")
    loaded = family.load(tmp_path / "step-000007")
    name = family.components[-1]
    left, right = (each.component(name).state_dict() for each in (saved, loaded))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert loaded.few_steps == FewSteps(2, None)
