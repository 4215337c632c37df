"""Training adapters over base weights in 8 and 4 bits: what is learnt, drawn, saved, resumed, and refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from glm_training.config import ConfigError
from glm_training.engine.agreement import weights_digest
from glm_training.engine.errors import SettingsError
from glm_training.models import quantization
from glm_training.models.quantization import quantised_layers
from glm_training.trainers.run import build_trainer
from glm_training.utils.distributed import World
from tests import preference_runs
from tests.parity.launching import run_two_processes
from tests.parity.quantised_worker import LEARNS
from tests.runs import config_of, trainer_of, weights_of

NEEDED = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes not installed")
ADAPTED = ["lora.enabled=true", "lora.rank=4", "training.optimizer=adamw", "training.adam_beta1=0.9"]
NF4 = ["model.quantization=nf4", *ADAPTED]


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["lora.enabled=false"], "`ar` is trained whole"),
        (["lora.enabled=true", "lora.dit.enabled=false"], "Set `lora.dit.enabled: true`"),
        (["lora.enabled=true", "checkpoint.save_lora_only=false"], "a pipeline needs the base weights in full"),
        (["lora.enabled=true", "training.method=opd"], "teachers lay their weights"),
        (["lora.enabled=true", "training.method=dmdr"], "distillation keeps a copy"),
        (["model.family=vgt", "data.images=x"], "trained whole, without adapters"),
    ],
)
def test_what_needs_weights_in_full_is_refused(tmp_path, keys, told):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, "model.quantization=nf4", *keys)
    assert told in str(caught.value) and "no adapters to save" not in str(caught.value)


def test_a_missing_package_names_its_extra_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "PACKAGE", "no_such_package_is_installed")
    with pytest.raises(SettingsError, match=r'needs bitsandbytes: pip install "glm_training\[bitsandbytes\]"'):
        trainer_of(tmp_path, *NF4)


@NEEDED
@pytest.mark.parametrize("part", ["ar", "dit"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_loss_falls(tmp_path, part, kind):
    keys = [
        "training.use_reward=false",
        "training.batch_size=4",
        "training.max_steps=12",
        "training.learning_rate=0.01",
    ]
    trainer = trainer_of(tmp_path, f"model.quantization={kind}", *ADAPTED, f"model.component={part}", *keys)
    frozen = weights_digest_of_base(trainer.family.module(part))
    trainer.train()
    losses = [line[f"{part}/loss"] for line in figures(tmp_path)]
    assert len(losses) == 12 and sum(losses[-3:]) / 3 < 0.97 * losses[0]
    assert weights_digest_of_base(trainer.family.module(part)) == frozen


def weights_digest_of_base(module: torch.nn.Module) -> list[str]:
    return [weights_digest(layer) for layer in quantised_layers(module).values()]


@NEEDED
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_replay_is_the_rollout_and_the_reference_is_the_start(tmp_path, kind):
    trainer = trainer_of(tmp_path, f"model.quantization={kind}", *ADAPTED, "training.learning_rate=0.001")
    trainer.train()
    first, second = figures(tmp_path)
    eps = torch.finfo(torch.float32).eps
    assert first["gate/ar_log_prob_max"] <= 32 * eps and first["gate/dit_ratio_max"] <= 32 * eps
    assert first["gate/ar_reference_max"] == first["gate/dit_reference_max"] == 0
    assert first["ar/kl"] == 0 and second["ar/kl"] > 0


@NEEDED
def test_a_checkpoint_holds_adapters_and_a_resume_goes_on_bit_for_bit(tmp_path):
    keys = [*NF4, "training.max_steps=3", "training.ema.decay=0.5"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for folder in (whole, halved):
        folder.mkdir()
    straight = trainer_of(whole, *keys)
    straight.train()
    trainer_of(halved, *keys, "training.max_steps=2").train()
    resumed = trainer_of(halved, *keys, "checkpoint.resume_from=latest")
    resumed.train()
    expected, found = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(expected[part][name], found[part][name]) for part in expected for name in expected[part])
    saved = {path.name for path in (whole / "run/checkpoints/step-000003").iterdir()}
    assert {"lora_ar", "lora_dit"} <= saved and "pipeline" not in saved


@NEEDED
def test_saved_adapters_go_on_the_base_in_full(tmp_path):
    first = trainer_of(tmp_path, *NF4, "model.component=dit", "training.max_steps=1")
    first.train()
    folder = tmp_path / "run/checkpoints/step-000001/lora_dit"
    again = trainer_of(
        tmp_path, *ADAPTED, "model.component=dit", f"lora.start_from={folder}", f"output_dir={tmp_path}/b"
    )
    expected, found = weights_of(first)["dit"], weights_of(again)["dit"]
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert not quantised_layers(again.family.module("dit"))


@NEEDED
def test_adapters_are_merged_before_there_are_few_bits(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    keys = ["model.component=dit", "training.max_steps=1", "training.learning_rate=0.05"]
    trainer_of(first, *NF4, *keys).train()
    folder = first / "run/checkpoints/step-000001/lora_dit"
    bases = []
    for adapters in ("[]", f"[{folder}]"):
        trainer = trainer_of(first, *NF4, *keys, f"model.adapters={adapters}", f"output_dir={tmp_path}/b")
        bases.append(weights_digest_of_base(trainer.family.module("dit")))
    assert bases[0] != bases[1]


@NEEDED
def test_preferences_train_sdxl_over_few_bits(tmp_path):
    trainer = build_trainer(preference_runs.config_of(tmp_path, "sdxl", "model.quantization=nf4"), World())
    assert quantised_layers(trainer.family.module("unet"))
    trainer.train()
    assert len(figures(tmp_path)) >= 2


@NEEDED
def test_two_processes_are_one(tmp_path):
    """Loaded weights are compared, scales included, and DDP takes frozen integers."""
    run_two_processes("quantised_worker.py", str(tmp_path))
    alone = trainer_of(tmp_path, *LEARNS, "training.batch_size=4")
    alone.training_step()
    expected = weights_of(alone)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"quantised-{rank}.pt")
        for part, weights in expected.items():
            for name, value in weights.items():
                torch.testing.assert_close(found[part][name], value, rtol=0, atol=1e-5)


@NEEDED
def test_the_digest_of_loaded_weights_has_their_scales(tmp_path):
    for kind in ("int8", "nf4"):
        module = trainer_of(tmp_path, *ADAPTED, f"model.quantization={kind}").family.module("dit")
        before, layer = weights_digest(module), next(iter(quantised_layers(module).values()))
        (layer.absmax if kind == "int8" else layer.weight.quant_state.state2.absmax).mul_(2)
        assert weights_digest(module) != before
