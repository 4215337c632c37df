"""Supervised finetuning that names no metric needs none: it scores by those that can be had, and says which cannot.
A model's own size is the size of its images."""

from __future__ import annotations

import sys

import pytest
import yaml

from glm_training.cli import main
from glm_training.config import Config
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.sdxl.family import SDXL
from tests.reward_files import write_alexnet
from tests.runs import config_of, write_config


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["glm-train", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code


@pytest.fixture
def plain(tmp_path, monkeypatch) -> list[str]:
    """`use_reward: false` and no word on rewards, on a machine without the metrics' files; evaluations are on."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    path = write_config(tmp_path)
    tree = yaml.safe_load(path.read_text())
    del tree["reward"]
    tree["training"] |= {"use_reward": False, "max_steps": 1}
    tree["evaluation"]["enabled"] = True
    own = tmp_path / "plain.yaml"
    own.write_text(yaml.safe_dump(tree))
    return ["--config", str(own), f"output_dir={tmp_path}/plain"]


MISSED = "not installed here, nor named in reward.metrics"


def notes_on_metrics(out: str) -> list[str]:
    return [line for line in out.splitlines() if "held-out pictures" in line or "aesthetic" in line]


def test_it_starts_and_says_in_one_short_line_what_it_does_without(plain, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "train", *plain) == 0
    told = capsys.readouterr()
    expected = f"note: no scores of held-out pictures without lpips and aesthetic: {MISSED}"  # a prompt quotes no word
    assert notes_on_metrics(told.out) == [expected]
    assert told.err == "" and (tmp_path / "plain/checkpoints/step-000001/manifest.json").is_file()
    assert '"eval/total"' not in (tmp_path / "plain/metrics.jsonl").read_text()


def test_one_metric_that_all_prompts_can_have_is_enough(plain, tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "held_out.txt"
    prompts.write_text('a sign that says "BAR"\na sign that says "TAXI"\n')
    assert run(monkeypatch, "train", *plain, f"evaluation.eval_prompts_file={prompts}") == 0
    expected = f"note: held-out pictures are scored without lpips and aesthetic: {MISSED}"
    assert notes_on_metrics(capsys.readouterr().out) == [expected]
    assert '"eval/text_accuracy"' in (tmp_path / "plain/metrics.jsonl").read_text()


def test_what_can_be_had_is_scored(plain, tmp_path, monkeypatch, capsys):
    here = f"reward.options.lpips.backbone_weights={write_alexnet(tmp_path / 'alexnet.pth')}"
    assert run(monkeypatch, "train", *plain, here) == 0
    assert notes_on_metrics(capsys.readouterr().out) == [
        f"note: held-out pictures are scored without aesthetic: {MISSED}"
    ]
    assert '"eval/lpips"' in (tmp_path / "plain/metrics.jsonl").read_text()


def test_a_named_metric_must_be_there(plain, monkeypatch, capsys):
    assert run(monkeypatch, "validate", *plain, "reward.metrics={lpips: 1.0}") == 2
    assert "AlexNet weights not found" in capsys.readouterr().err


def test_the_default_size_is_the_models_own(tmp_path):
    made = SDXL.load("tiny-random")
    made.save_pretrained(tmp_path / "sdxl")
    side = made.unet.unet.config["sample_size"] * made.unet.latent_scale
    for model in ("tiny-random", str(tmp_path / "sdxl")):
        config = Config.model_validate({"model": {"family": "sdxl", "name": model}, "training": {"method": "dmdr"}})
        assert (config.data.image_size.height, config.data.image_size.width) == (side, side) == (64, 64)
    for model in ("tiny", "tiny-random"):
        size = Config.model_validate({"model": {"name": model}}).data.image_size
        assert size.height == size.width == GLMImage.load(model).dit.vae.config["sample_size"] == 128
    given = Config.model_validate({"model": {"name": "tiny"}, "data": {"image_size": {"height": 256}}}).data.image_size
    assert (given.height, given.width) == (256, 128)
    assert Config.model_validate({}).data.image_size.width == 1024
    assert config_of(tmp_path).data.image_size.height == 64
