"""Which weights a checkpoint's exports and the evaluations have, and which a resume goes on with, for each trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.engine.optimizers import averaged_weights
from glm_training.trainers.base_trainer import BaseTrainer
from tests import dmdr_runs, preference_runs, runs
from tests.engine.test_update_rules import needs
from tests.same import assert_identical

LORA = ["lora.enabled=true", "lora.rank=2", "lora.alpha=4", "checkpoint.save_lora_only=true"]
SHORT = ["training.max_steps=2", "training.learning_rate=1e-2", "training.optimizer=adamw", "training.adam_beta1=0.9"]
EMA = ["training.ema.decay=0.5"]
SUPERVISED = ["training.use_reward=false", "model.component=ar"]


def trained(kind: str, folder: Path, *keys: str) -> tuple[BaseTrainer, str]:
    """A run of two steps to its end with adapters, and the name of its part."""
    keys = (*LORA, *SHORT, *keys)
    if kind == "supervised":
        trainer, part = runs.trainer_of(folder, *SUPERVISED, *keys), "ar"
    elif kind == "reward":
        trainer, part = runs.trainer_of(folder, "model.component=dit", *keys), "dit"
    elif kind == "dpo":
        trainer, part = preference_runs.trainer_of(folder, "glm_image", "model.component=dit", *keys), "dit"
    else:
        # the generator alone moves at every second step
        trainer, part = dmdr_runs.trainer_of(folder, "dmdr.update_ratio=1", *keys, family="glm_image"), "dit"
    trainer.train()
    return trainer, part


def exported(trainer: BaseTrainer, part: str) -> dict[str, torch.Tensor]:
    """The adapter in the last checkpoint, by the names of the part's parameters."""
    file = trainer.config.checkpoint_dir() / "step-000002" / f"lora_{part}" / "adapter_model.safetensors"
    short = {name.replace(".default.", "."): name for name in trainer.parts[part].parameters}
    return {short[key.removeprefix("base_model.model.")]: value for key, value in load_file(file).items()}


def own(trainer: BaseTrainer, part: str) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in trainer.parts[part].parameters.items()}


@pytest.mark.parametrize("kind", ["supervised", "reward", "dpo", "dmdr"])
def test_every_trainer_exports_its_average_and_keeps_its_weights(tmp_path, kind):
    trainer, part = trained(kind, tmp_path, *EMA)
    state = load_checkpoint(trainer.config.checkpoint_dir() / "step-000002")
    assert_identical(exported(trainer, part), state[f"{part}_ema"])
    assert_identical(own(trainer, part), state[f"{part}_weights"])
    assert any(not torch.equal(state[f"{part}_ema"][name], value) for name, value in own(trainer, part).items())


def test_the_weights_under_training_are_exported_where_that_is_asked_for(tmp_path):
    trainer, part = trained("supervised", tmp_path, *EMA, "training.ema.export=false")
    assert_identical(exported(trainer, part), own(trainer, part))
    assert f"{part}_ema" in load_checkpoint(trainer.config.checkpoint_dir() / "step-000002")


def test_scores_are_of_the_average_unless_told_otherwise(tmp_path):
    """The held-out loss of the last evaluation is that of the weights it was said to be of."""
    losses = {}
    for evaluate in ("true", "false"):
        folder = tmp_path / evaluate
        folder.mkdir()
        keys = [*EMA, f"training.ema.evaluate={evaluate}", "evaluation.enabled=true", "reward.enabled=false"]
        trainer, part = trained("supervised", folder, *keys)
        losses[evaluate] = trainer.evaluations.compared(2)[1]["ar/loss"]
        own_loss = trainer.validate()["ar/loss"]
        with trainer.parts[part].ema.snapshot.applied():
            average_loss = trainer.validate()["ar/loss"]
        assert losses[evaluate] == (average_loss if evaluate == "true" else own_loss)
    assert losses["true"] != losses["false"]


@needs("adamw_schedule_free")
def test_schedule_free_exports_its_average_and_resumes_with_its_weights(tmp_path):
    trainer, part = trained("supervised", tmp_path, "training.optimizer=adamw_schedule_free")
    trained_part = trainer.parts[part]
    average = averaged_weights(trained_part.optimizer, trained_part.parameters)
    state = load_checkpoint(trainer.config.checkpoint_dir() / "step-000002")
    assert_identical(exported(trainer, part), average)
    assert_identical(own(trainer, part), state[f"{part}_weights"])
    assert any(not torch.equal(average[name], value) for name, value in own(trainer, part).items())


@needs("adamw_schedule_free", "muon")
def test_four_steps_equal_two_steps_and_a_resume_under_other_rules(tmp_path):
    """Evaluated and exported at other steps too: what is shown leaves no trace."""
    shared = [
        "training.use_reward=false",
        *(key for key in SHORT if "max_steps" not in key and "learning_rate" not in key),
        "training.learning_rate=null",
        "optimizer.ar.name=muon",
        "optimizer.dit.name=adamw_schedule_free",
        "training.max_steps=4",
        "reward.enabled=false",
    ]
    whole = [f"output_dir={tmp_path}/whole", "logging.save_interval=2", "evaluation.enabled=true"]
    runs.trainer_of(tmp_path, *shared, *whole).train()
    resume = f"checkpoint.resume_from={tmp_path}/whole/checkpoints/step-000002"
    half = [f"output_dir={tmp_path}/half", resume, "logging.save_interval=1", "resume.accept=[logging,evaluation]"]
    runs.trainer_of(tmp_path, *shared, *half).train()
    left, right = (load_checkpoint(tmp_path / name / "checkpoints" / "step-000004") for name in ("whole", "half"))
    kinds = [kind for kind in left if kind.startswith(("ar_", "dit_"))]
    assert set(kinds) == {"ar_weights", "ar_optimizer", "dit_weights", "dit_optimizer"}
    assert_identical({kind: left[kind] for kind in kinds}, {kind: right[kind] for kind in kinds})
