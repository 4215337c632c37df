"""A distillation step: the draws of its two networks, and the strength of the adapter while the fake score learns."""

from __future__ import annotations

import pytest
import torch

from glm_training.models.lora import ADAPTER
from glm_training.trainers import dmdr_trainer
from glm_training.trainers.dmdr_trainer import GUIDANCE
from tests.dmdr_runs import config_of, trainer_of


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_noise_levels_steps_and_noises_are_drawn_apart(tmp_path):
    """Of 400 samples no two of the three uniforms correlate by more than five standard errors (1/20)."""
    draws = trainer_of(tmp_path)._draws(list(range(400)))
    uniforms = {"step": draws.pick, "guidance": draws.guidance[1], "generator": draws.generator[1]}
    for name, values in uniforms.items():
        assert values.shape == (400,)
        for other, theirs in uniforms.items():
            assert name == other or abs(correlation(values, theirs)) < 5 / 20, (name, other)
    noises = [draws.start[:, 0], draws.start[:, 1], draws.guidance[0], draws.generator[0]]
    for i, noise in enumerate(noises):
        for other in noises[:i]:
            assert abs(correlation(noise, other)) < 5 / noise.numel() ** 0.5


@pytest.mark.parametrize(("key", "step"), [("dmdr.dynamic_renoise=false", 0), ("dmdr.dynamic_steps=2", 2)])
def test_each_network_is_trained_at_its_own_draws(tmp_path, monkeypatch, key, step):
    """At the level and with the noise that `_draws` gives it, where DynaRS is switched off or has ended: levels are
    uniform then."""
    trainer = trainer_of(tmp_path, "dmdr.update_ratio=1", key, "dmdr.renoise_range=[0.2, 0.6]")
    trainer.step = step
    draws, seen = trainer._draws([0, 1]), {}
    for name in ("fake_score_loss", "generator_loss"):
        real = getattr(dmdr_trainer, name)

        def spy(*given, real=real, name=name, **options):
            seen[name] = options
            return real(*given, **options)

        monkeypatch.setattr(dmdr_trainer, name, spy)
    trainer.training_step()
    for name, (noise, level) in (("fake_score_loss", draws.guidance), ("generator_loss", draws.generator)):
        assert torch.equal(seen[name]["noise"], noise)
        torch.testing.assert_close(seen[name]["u"], 0.2 + 0.4 * level)
    assert seen["generator_loss"]["real_scale"] == trainer.dynamics.real_scale(step)


def test_the_fake_score_learns_with_its_adapter_at_fake_scale(tmp_path):
    """Forward and backward; afterwards the adapter is at full strength again."""
    trainer = trainer_of(tmp_path, "dmdr.fake_scale=0.25", "dmdr.guidance_alpha=6", "dmdr.guidance_rank=2")
    layer = next(module for module in trainer.teacher.modules() if hasattr(module, "lora_A") and module.lora_A)
    seen = {"forward": [], "backward": []}
    layer.register_forward_hook(lambda *_: seen["forward"].append((torch.is_grad_enabled(), layer.scaling[ADAPTER])))
    layer.lora_B[ADAPTER].weight.register_hook(lambda _: seen["backward"].append(layer.scaling[ADAPTER]))
    trainer.training_step()
    assert [scale for gradient, scale in seen["forward"] if gradient] == [0.25 * 3] and seen["backward"] == [0.25 * 3]
    assert layer.scaling[ADAPTER] == 3


def test_the_guidance_network_has_a_learning_rate_of_its_own(tmp_path):
    trainer = trainer_of(tmp_path, "dmdr.guidance_learning_rate=0.02", "training.learning_rate=0.001")
    assert (trainer.parts[GUIDANCE].settings.learning_rate, trainer.generator.settings.learning_rate) == (0.02, 0.001)
    same = trainer_of(tmp_path, "training.learning_rate=0.001")
    assert same.parts[GUIDANCE].settings.learning_rate == 0.001


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_conditions_are_asked_for_with_the_samples_epoch(tmp_path, family):
    """Four prompts, two at once: the third batch belongs to the second epoch."""
    trainer = trainer_of(tmp_path, family=family)
    asked = []
    real = trainer.conditions.of
    trainer.conditions.of = lambda prompts, indices, epochs: asked.append(epochs) or real(prompts, indices, epochs)
    for _ in range(3):
        trainer.training_step()
        trainer.step += 1
    assert asked == [[0, 0], [0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        ([], 8),
        (["dmdr.cold_start_steps=4"], 4),
        (["dmdr.cold_start_steps=4", "dmdr.dynamic_steps=6"], 6),
    ],
)
def test_both_strategies_last_as_long_as_told_or_the_cold_start_or_the_run(tmp_path, keys, length):
    """Of 8 steps. The real score's weight, 0.5 at first, has half of it midway and none at the end."""
    config = config_of(tmp_path, *keys, *(["dmdr.reward.decoder=vae"] if keys else []), "dmdr.real_scale=0.5")
    found = dmdr_trainer.dynamics(config, 8)
    scales = [found.real_scale(step) for step in (0, length // 2, length)]
    assert scales == pytest.approx([0.5, 0.25, 0], abs=1e-12) and found.real_scale(length - 1) > 0


def test_where_no_cold_start_is_to_last_both_strategies_are_at_their_ends(tmp_path):
    found = dmdr_trainer.dynamics(config_of(tmp_path, "dmdr.cold_start_steps=0", "dmdr.reward.decoder=vae"), 8)
    assert [found.real_scale(step) for step in (0, 4, 8)] == [0, 0, 0]
    torch.testing.assert_close(found.levels(torch.tensor([0.0, 0.5, 1.0]), 0), torch.tensor([0.02, 0.5, 0.98]))


@pytest.mark.parametrize(("off", "moving"), [("guidance", "renoise"), ("renoise", "guidance")])
def test_each_strategy_is_switched_off_by_its_own_key(tmp_path, off, moving):
    """At the first step DynaDG has an adapter in the real score, and DynaRS levels that are not uniform."""
    found = dmdr_trainer.dynamics(config_of(tmp_path, f"dmdr.dynamic_{off}=false"), 8)
    uniform = torch.tensor([0.02, 0.26, 0.5, 0.74, 0.98])
    levels = found.levels(torch.linspace(0, 1, 5), 0)
    moves = {"guidance": found.real_scale(0) > 0, "renoise": not torch.allclose(levels, uniform, atol=1e-3)}
    assert moves == {off: False, moving: True}
