"""Supervised and reward steps with what frozen encoders give from the cache: the same bits as without, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glm_training.data.problems import DataError
from glm_training.engine.encoding.ahead import Encoding
from glm_training.engine.encoding.encoder import GLMEncoder
from glm_training.models.glm_image.family import GLMImage
from tests.opd_runs import opd
from tests.runs import config_of, trainer_of, weights_of
from tests.same import assert_identical

PLAIN = ["training.use_reward=false"]
REWARD = ["training.learning_rate=0.01"]
RUNS = {
    "both halves": (PLAIN, "t2i"),
    "both halves, mirrored": ([*PLAIN, "data.augmentation=true"], "t2i"),
    "both halves, edits": ([*PLAIN, "data.augmentation=true"], "i2i"),
    "the AR half alone, edits": ([*PLAIN, "model.component=ar"], "i2i"),
    "the DiT half alone": ([*PLAIN, "model.component=dit"], "t2i"),
    "rewards": (REWARD, "t2i"),
    "rewards, edits": (REWARD, "i2i"),
    "rewards and targets in turn, edits": ([*REWARD, "training.reward_frequency=2"], "i2i"),
}
ENTRIES = {
    # 4 noise targets, as many sources; "CAFE" and no quoted word
    "both halves": 4 + 2,
    # two of the four prompts quote or say left: their pictures are not mirrored
    "both halves, mirrored": 4 + 2 + 2,
    "both halves, edits": 2 * (4 + 2) + 2,
    "the AR half alone, edits": 8,
    "the DiT half alone": 4 + 2,
    "rewards": 2,
    "rewards, edits": 4 + 2,
    "rewards and targets in turn, edits": 8 + 2,
}


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cache").rglob("*.safetensors"))


def stepped(folder: Path, *overrides: str, mode: str = "t2i", steps: int = 2):
    trainer = trainer_of(folder, *overrides, mode=mode)
    trainer.prepare()
    for _ in range(steps):
        trainer.training_step()
        trainer.step += 1
    return trainer


def cached(folder: Path, *overrides: str, mode: str = "t2i", steps: int = 2):
    return stepped(folder, f"cache.dir={folder}/cache", *overrides, mode=mode, steps=steps)


def differences(left, right) -> dict[str, float]:
    a, b = weights_of(left), weights_of(right)
    return {part: max((a[part][name] - b[part][name]).abs().max().item() for name in a[part]) for part in a}


@pytest.mark.parametrize("run", RUNS)
def test_a_cache_changes_no_bit_and_is_filled_once(tmp_path, run, monkeypatch) -> None:
    overrides, mode = RUNS[run]
    first = cached(tmp_path, *overrides, mode=mode)
    plain = stepped(tmp_path, "cache.enabled=false", *overrides, mode=mode)
    moved = differences(first, trainer_of(tmp_path, *overrides, mode=mode))
    assert all(change > 0 for change in moved.values()), "nothing was learnt"
    assert set(differences(first, plain).values()) == {0.0}
    assert len(files(tmp_path)) == ENTRIES[run]
    judged, again = first.judge(), plain.judge()
    assert judged.keys() == again.keys() and all(torch.equal(judged[name], again[name]) for name in judged)
    for name in ("picture", "text"):
        monkeypatch.setattr(GLMEncoder, name, lambda *_: pytest.fail("encoded again"))
    second = cached(tmp_path, *overrides, mode=mode)
    assert set(differences(first, second).values()) == {0.0}
    batch = second.dataset.batch([0])
    scored = not run.startswith(("both", "the"))
    assert (batch.targets is not None) == scored, "pixels are decoded for rewards alone"


def test_a_changed_picture_size_or_encoder_is_a_miss_and_a_renamed_one_is_found(tmp_path) -> None:
    cached(tmp_path, *PLAIN, steps=0)
    count = len(files(tmp_path))
    others = ["data.image_size.height=96", "model.torch_dtype=bfloat16", "seed=4"]  # the seed draws other weights
    for number, other in enumerate(others):
        cached(tmp_path, *PLAIN, other, steps=0)
        assert len(files(tmp_path)) >= count + 4 * (number + 1), f"{other}: entries of another encoder were taken"
    count = len(files(tmp_path))
    targets = tmp_path / "data/target_images"
    (targets / "0.png").rename(targets / "swap.png")
    (targets / "1.png").rename(targets / "0.png")
    (targets / "swap.png").rename(targets / "1.png")
    cached(tmp_path, *PLAIN, steps=0)
    assert len(files(tmp_path)) == count, "the same pictures under each other's names"
    Image.new("RGB", (64, 64), "red").save(targets / "0.png")
    cached(tmp_path, *PLAIN, steps=0)
    assert len(files(tmp_path)) == count + 1


def test_a_mirrored_picture_is_encoded_mirrored(tmp_path) -> None:
    """Not its latents turned round, which the VAE would not give."""
    trainer = cached(tmp_path, *PLAIN, "data.augmentation=true", steps=0)
    epochs = [epoch for epoch in range(20) if trainer.dataset.batch([0], epoch=epoch).target_views[0].flipped]
    views = trainer.dataset.batch([0], epoch=epochs[0]).target_views
    trainer.dataset.decodes = True
    batch = trainer.dataset.batch([0], epoch=epochs[0])
    found = trainer.encoding.shown(views, None)
    assert torch.equal(found["latents"], trainer.family.dit.encode_images(batch.targets))
    plain = trainer.family.dit.encode_images(batch.targets.flip(-1))
    assert not torch.allclose(found["latents"], plain.flip(-1), atol=1e-3)


def test_a_picture_that_changes_after_the_start_does_not_pass_for_the_old_one(tmp_path) -> None:
    trainer = trainer_of(tmp_path, *PLAIN, f"cache.dir={tmp_path}/cache")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "data/target_images/2.png")
    with pytest.raises(DataError, match="2.png: changed since the start of the run. Put .* or start a new run"):
        trainer.prepare()


def test_an_entry_that_is_gone_or_damaged_in_training_is_made_anew(tmp_path) -> None:
    whole = cached(tmp_path, *PLAIN)
    trainer = cached(tmp_path, *PLAIN, steps=0)
    trainer.encoding.cache._recent.clear()
    trainer.family.dit.glyphs.clear()
    for number, path in enumerate(files(tmp_path)):
        path.unlink() if number % 2 else path.write_bytes(path.read_bytes()[:-4] + b"ruin")
    for _ in range(2):
        trainer.training_step()
        trainer.step += 1
    assert set(differences(trainer, whole).values()) == {0.0}
    assert len(files(tmp_path)) == ENTRIES["both halves"]


SLEEPERS = {
    "both": (PLAIN, lambda f: [f.ar.model.model.visual, f.ar.model.model.vqmodel, f.dit.vae, f.dit.text_encoder]),
    "ar": (PLAIN, lambda f: [f.ar.model.model.visual, f.ar.model.model.vqmodel, f.dit]),
    "dit": (PLAIN, lambda f: [f.ar, f.dit.vae, f.dit.text_encoder]),
    # what decodes the drawn pictures stays, and so does a half that draws
    "dit, rewards": (REWARD, lambda f: [f.ar.model.model.visual, f.ar.model.model.vqmodel, f.dit.text_encoder]),
}


@pytest.mark.parametrize("case", SLEEPERS)
def test_what_no_step_uses_sleeps(tmp_path, case) -> None:
    overrides, expected = SLEEPERS[case]
    trainer = trainer_of(tmp_path, *overrides, f"model.component={case.split(',')[0]}")
    assert trainer.encoding.encoder.sleepers(pictures=True) == expected(trainer.family)


@pytest.mark.parametrize("component", ["ar", "dit"])
def test_the_half_that_distillation_on_policy_only_draws_with_stays_awake(tmp_path, component) -> None:
    config, family = config_of(tmp_path, *opd(tmp_path), f"model.component={component}"), GLMImage.load("tiny-random")
    asleep = GLMEncoder(config, family).sleepers(pictures=True)
    looks = family.ar.model.model
    assert asleep == [looks.visual, looks.vqmodel, family.dit.text_encoder]


@pytest.mark.parametrize("case", ["both halves", "the AR half alone, edits", "the DiT half alone", "rewards, edits"])
def test_steps_and_held_out_losses_need_nothing_that_sleeps(tmp_path, case) -> None:
    """The meta device stands for one that the sleepers are not on: nothing can be computed there, nor read from it."""
    overrides, mode = RUNS[case]
    whole = cached(tmp_path, *overrides, mode=mode, steps=1)
    trainer = cached(tmp_path, *overrides, mode=mode, steps=0)
    for module in trainer.encoding.encoder.sleepers(pictures=True):
        module.to("meta")
    trainer.training_step()
    assert set(differences(trainer, whole).values()) == {0.0}
    if "rewards" not in case:
        assert_identical(trainer.judge(), whole.judge())


def test_the_encoders_are_awake_while_anything_is_drawn_and_asleep_in_steps(tmp_path, monkeypatch) -> None:
    moves: list[str] = []
    monkeypatch.setattr(Encoding, "_move", lambda self, device: moves.append(str(device)))
    asleep: list[bool] = []
    trainer = trainer_of(tmp_path, *PLAIN, "logging.log_images=true")
    monkeypatch.setattr(
        trainer.family, "draw", lambda *a, **k: asleep.append(trainer.encoding._asleep) or torch.rand(2, 3, 64, 64)
    )
    encode = trainer.supervision.terms.encode
    in_steps: list[bool] = []
    monkeypatch.setattr(
        trainer.supervision.terms, "encode", lambda *a: in_steps.append(trainer.encoding._asleep) or encode(*a)
    )
    trainer.train()
    assert asleep and not any(asleep) and in_steps and all(in_steps)


def test_nothing_is_encoded_for_a_cache_that_is_off(tmp_path) -> None:
    trainer = stepped(tmp_path, *PLAIN, "cache.enabled=false", steps=1)
    assert not (tmp_path / "run/cache").exists() and trainer.dataset.decodes and not trainer.encoding._asleep
    assert config_of(tmp_path, *PLAIN).encoded_cache_dir() == tmp_path / "run/cache"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_does_not_come_to_all_encodes_what_it_comes_to(tmp_path, resumed) -> None:
    keys = [*PLAIN, "training.batch_size=1"]
    trainer = trainer_of(tmp_path, *keys, f"cache.dir={tmp_path}/cache")
    drawn = trainer.sampler.coming(2)
    if resumed:
        trainer.step = 1
        trainer.sampler.next()
    trainer.prepare()
    shown = {trainer.dataset.batch([index]).target_views[0] for index in drawn[int(resumed) :]}
    judged = set(trainer.held_out.views())
    pictures = [path for path in files(tmp_path) if "latents" in load_file(path)]
    assert len(pictures) == len(shown | judged) < 5
    figures = [trainer.training_step() for _ in range(2 - int(resumed))]
    plain = stepped(tmp_path, "cache.enabled=false", *keys)
    if not resumed:
        assert figures and set(differences(trainer, plain).values()) == {0.0}


def test_a_run_at_its_end_encodes_nothing_more_to_train_on(tmp_path) -> None:
    trainer = trainer_of(tmp_path, *PLAIN, f"cache.dir={tmp_path}/cache")
    trainer.step = trainer.total_steps
    trainer.prepare()
    assert len(files(tmp_path)) == 2 + 2, "two held-out pictures, which are judged, and their quoted words"
