"""Every recipe fits the full-size configurations and its bench, and trains a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.merging import kept, write_tasks
from benchmarks.methods.__main__ import TASKS
from glm_training.config import load_config
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import init_world

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "recipes"
AR, DIT = TASKS["objects"], TASKS["words"]
ELSEWHERE = ("opd",)
"""Recipes that learn from no reward: opd is measured by `benchmarks.merging`."""
SMALL = (
    "model.name=tiny-random",
    "data.image_size={height: 64, width: 64}",
    "training.batch_size=2",
    "training.max_steps=1",
    "reward.metrics={structure: 1.0}",
    "model.dit.num_inference_steps=5",
    "evaluation.enabled=false",
)
DATA = ("data.prompts_file=data/t2i/prompts.txt", "data.target_images_dir=data/t2i/target_images")


def test_every_recipe_is_measured():
    assert sorted([*AR, *DIT, *ELSEWHERE]) == sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", [*AR, *DIT])
@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_a_recipe_lies_over_the_full_size_configuration(name, mode):
    config = load_config([ROOT / f"configs/{mode}_training.yaml", RECIPES / f"{name}.yaml"])
    assert config.model.name == "zai-org/GLM-Image" and config.model.component == "both"


@pytest.mark.parametrize("name", [*AR, *DIT])
def test_a_recipe_trains_its_half(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    half, task = ("ar", "objects") if name in AR else ("dit", "words")
    group = "rollout.plans_per_prompt=2" if half == "ar" else "rollout.renders_per_plan=2"
    config = load_config(
        [ROOT / f"benchmarks/methods/{task}.yaml", RECIPES / f"{name}.yaml"],
        [*SMALL, *DATA, group, f"output_dir={tmp_path / 'run'}"],
    )
    trainer = build_trainer(config, init_world(True, None))
    before = {key: value.detach().clone() for key, value in trainer.parts[half].parameters.items()}
    assert trainer.train().step == 1
    moved = [key for key, value in trainer.parts[half].parameters.items() if not value.equal(before[key])]
    assert len(moved) > len(before) / 2


def test_distillation_lies_over_the_full_size_configuration_with_its_teachers():
    teachers = "opd.teachers={text: {adapters: a, prompts_file: p}, scenes: {model: m, prompts_file: q}}"
    for mode in ("t2i", "i2i"):
        config = load_config([ROOT / f"configs/{mode}_training.yaml", RECIPES / "opd.yaml"], [teachers])
        assert config.training.method == "opd" and config.group().size == 1 and not config.uses_reward()
        assert list(config.opd.teachers) == ["text", "scenes"] and config.rollout.sde_kernel == "flow"


def test_what_merging_keeps_is_told_by_hand():
    """Gains of .4 and .2 of an expert, of .1 and .2 of the merged model: half of .3, within the spread of prompts."""
    found = kept([0.1, 0.2], [0.5, 0.4], [0.2, 0.4])
    assert (found["expert_gain"], found["gain"], found["kept"]) == (0.3, 0.15, 0.5)
    assert (found["expert_standard_error"], found["standard_error"]) == (0.1, 0.05)


def test_merging_parts_the_prompts_by_their_quotes(tmp_path):
    folders = write_tasks(ROOT / "data/t2i", tmp_path)
    prompts = {task: (folder / "all.txt").read_text().splitlines() for task, folder in folders.items()}
    assert sorted(prompts["signs"] + prompts["scenes"]) == sorted(prompts["both"])
    assert all('"' in prompt for prompt in prompts["signs"]) and not any('"' in p for p in prompts["scenes"])
    held = [json.loads(line) for line in (folders["signs"] / "held_out.jsonl").read_text().splitlines()]
    assert all((folders["signs"] / record["target"]).is_file() and '"' in record["prompt"] for record in held)


@pytest.mark.parametrize("ar", AR)
@pytest.mark.parametrize("dit", DIT)
def test_one_recipe_of_each_half_goes_with_the_other(ar, dit):
    """In either order each half learns by what its recipe says alone."""
    base, files = ROOT / "configs/t2i_training.yaml", (RECIPES / f"{ar}.yaml", RECIPES / f"{dit}.yaml")
    alone = [load_config([base, file]) for file in files]
    for order in (files, files[::-1]):
        both = load_config([base, *order])
        assert both.policy_for("ar") == alone[0].policy_for("ar")
        assert both.policy_for("dit") == alone[1].policy_for("dit")
        assert both.reward.grpo.ar == alone[0].reward.grpo.ar and both.reward.grpo.dit == alone[1].reward.grpo.dit
        assert both.reward.grpo.ratio_level == alone[0].reward.grpo.ratio_level
        assert both.reward.grpo.loss_aggregation == alone[0].reward.grpo.loss_aggregation
        assert both.rollout == alone[1].rollout
