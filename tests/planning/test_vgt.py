"""Plans of VGT against what its trainers hold, measured on the tiny models in a step of two passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from glm_training.config import load_config
from glm_training.engine.parts import Part
from glm_training.models.loading import ModelLoadError
from glm_training.planning.disk import checkpoints
from glm_training.planning.run import read_run
from glm_training.planning.tracing import Alive
from glm_training.planning.vgt import VGTMemory, read_vgt
from tests.vgt_runs import config_of, trainer_of

ROOT = Path(__file__).parents[2]
TWO = ("training.gradient_accumulation_steps=2",)


def measured(monkeypatch, folder: Path, *overrides: str, component: str) -> dict[str, int]:
    """The most bytes of tensors in the passes of each part and in its step, of the second training step."""
    peaks: dict[str, int] = {}
    backward, stepped = Part.backward, Part.step
    alive = Alive()

    def passes(part: Part, loss: object) -> None:
        backward(part, loss)
        name = f"{part.name}: forward and backward"
        peaks[name] = max(peaks.get(name, 0), alive.peak)
        alive.reset()

    def step(part: Part, training_step: int) -> dict[str, float]:
        for group in part.optimizer.param_groups:
            group["foreach"] = True  # as on a GPU: all tensors at once
        alive.reset()
        found = stepped(part, training_step)
        peaks[f"{part.name}: optimizer step"] = alive.peak
        alive.reset()
        return found

    with alive:
        trainer = trainer_of(folder, *overrides, component=component)
        trainer.training_step()  # after it the moments are there
        trainer.step += 1
        monkeypatch.setattr(Part, "backward", passes)
        monkeypatch.setattr(Part, "step", step)
        alive.reset()
        trainer.training_step()
        words = trainer.family.generator
        peaks["tokens"] = (
            0 if words is None else words.encode_prompts(trainer.dataset.batch([0, 1]).prompts).ids.shape[1]
        )
    monkeypatch.undo()
    return peaks


@pytest.mark.parametrize(
    "component, overrides",
    [
        ("autoencoder", ()),
        ("autoencoder", ("vgt.gan.start_step=0", "vgt.latent_noise=0.1", "vgt.kl=true")),
        ("autoencoder", ("vgt.distillation_weight=0", "training.gradient_checkpointing=true")),
        ("generator", ("training.ema.decay=0.9",)),
        ("generator", ("training.batch_size=3", "training.gradient_checkpointing=true")),
    ],
)
def test_its_phases_are_what_a_step_holds(monkeypatch, tmp_path, component, overrides):
    """Within a tenth."""
    config = config_of(tmp_path, *TWO, *overrides, component=component)
    peaks = measured(monkeypatch, tmp_path, *TWO, *overrides, component=component)
    run = replace(read_run(config), prompt_tokens=peaks.pop("tokens"), evaluated=0)
    phases = {phase.name: phase for phase in VGTMemory(run, read_vgt(config)).phases()}
    assert phases.keys() == peaks.keys()
    for name, phase in phases.items():
        assert phase.total - phase.items["context"] == pytest.approx(peaks[name], rel=0.1), name


def test_published_sizes_need_nothing_of_this_machine():
    networks = read_vgt(load_config([str(ROOT / "configs/vgt_ar_pretrain.yaml")], []))
    memory = VGTMemory(read_run(networks.config), networks)
    generator, autoencoder = memory.by_name["generator"], memory.by_name["autoencoder"]
    tied = 151_674 * 896
    assert generator.frozen == tied and generator.count == generator.trained_count + tied
    assert not autoencoder.trained
    language = generator.total - tied
    assert 516e6 < language < 518e6, "24 layers of Qwen2.5's 0.5B, the queries and the head"
    larger = read_vgt(load_config([str(ROOT / "configs/vgt_ar_pretrain_1_6b.yaml")], [])).parts["generator"]
    assert larger.llm.config.num_hidden_layers == 28 and larger.llm.config.hidden_size == 1536


def test_the_first_stage_has_its_teacher_its_opponent_and_what_compares(tmp_path):
    networks = read_vgt(load_config([str(ROOT / "configs/vgt_ae_stage1.yaml")], []))
    run = read_run(networks.config)
    assert [half.name for half in run.halves] == ["autoencoder", "discriminator"]
    memory = VGTMemory(run, networks)
    assert set(memory.by_name) == {"autoencoder", "teacher", "discriminator", "lpips", "convnext"}
    assert memory.by_name["lpips"].total > 14e6 and memory.by_name["convnext"].total > 50e6
    wide = 4 * (memory.by_name["lpips"].frozen + memory.by_name["convnext"].frozen)
    assert memory.state(awake=True)["weights"] == wide + 2 * memory.by_name["teacher"].frozen
    saved = checkpoints(networks.config, memory).items["pipeline"]
    assert saved == 4 * memory.by_name["autoencoder"].total + 2 * memory.by_name["teacher"].total


def test_pictures_of_evaluations_go_through_the_autoencoder_a_few_at_a_time(tmp_path):
    networks = read_vgt(config_of(tmp_path, component="generator"))

    def held(**changes: int) -> dict[str, float]:
        memory = VGTMemory(replace(read_run(networks.config), **changes), networks)
        return next(phase.items for phase in memory.phases() if phase.name == "evaluation")

    eight, many = held(evaluated=8), held(evaluated=20)
    assert many["activations"] == eight["activations"] > held(evaluated=20, micro=2)["activations"]
    assert many["KV cache"] == 20 / 8 * eight["KV cache"]


def test_what_is_not_here_is_named_with_what_to_do():
    config = load_config([str(ROOT / "configs/vgt_tiny_ar_pretrain.yaml")], ["vgt.autoencoder=runs/nowhere"])
    with pytest.raises(ModelLoadError, match="vgt.autoencoder runs/nowhere is not here.*or with vgt.autoencoder=tiny"):
        read_vgt(config)
    later = load_config([str(ROOT / "configs/vgt_tiny_ar_sft.yaml")], ["vgt.autoencoder=tiny"])
    with pytest.raises(ModelLoadError, match="model.name runs/.* is not here, .* or with model.name=tiny"):
        read_vgt(later)
    tiny = load_config([str(ROOT / "configs/vgt_tiny_ar_pretrain.yaml")], ["vgt.autoencoder=tiny"])
    assert set(read_vgt(tiny).parts) == {"generator", "autoencoder"}
