"""VGT's autoencoder on the random tiny model: who is updated when, by which loss, and what a run leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.models.vgt.autoencoder import Autoencoder, Teacher
from glm_training.models.vgt.family import VGT
from glm_training.trainers import vgt_autoencoder_trainer
from glm_training.trainers.run import build_trainer
from glm_training.trainers.vgt_autoencoder_trainer import DISCRIMINATOR, VGTAutoencoderTrainer
from glm_training.utils.distributed import init_world
from glm_training.utils.randomness import normal
from tests.runs import weights_of
from tests.same import assert_identical
from tests.vgt_runs import config_of, stepped, trainer_of

GAN = ["vgt.gan.channels=32", "vgt.gan.stages=2"]
SGD = [
    "training.optimizer=sgd",
    "training.adam_beta2=0.999",
    "training.adam_beta1=0",
    "training.max_grad_norm=0",
    "training.learning_rate=0.05",
]


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def autoencoder_trainer(folder: Path, *overrides: str) -> VGTAutoencoderTrainer:
    trainer = trainer_of(folder, *overrides)
    assert isinstance(trainer, VGTAutoencoderTrainer)
    return trainer


def test_the_discriminator_is_silent_before_its_start(tmp_path):
    """Up to its start the run is that without one, bit for bit, and its own weights are those it was made with."""
    playing = autoencoder_trainer(tmp_path, "vgt.gan.start_step=2", *GAN)
    alone = autoencoder_trainer(tmp_path)
    start = weights_of(playing)[DISCRIMINATOR]
    after, without = stepped(playing), stepped(alone)
    assert_identical(after["autoencoder"], without["autoencoder"])
    assert_identical(after[DISCRIMINATOR], start)
    assert not playing.averages.any()
    after, without = stepped(playing, 1), stepped(alone, 1)
    assert all(not torch.equal(after[DISCRIMINATOR][name], value) for name, value in start.items())
    assert any(not torch.equal(after["autoencoder"][name], value) for name, value in without["autoencoder"].items())


def test_the_first_loss_is_that_of_its_terms(tmp_path):
    """MSE + .5 distillation + .2 (-mean D): the teacher is the tower itself at the start, so that its term is 0."""
    trainer = autoencoder_trainer(tmp_path, "vgt.gan.start_step=0", "vgt.gan.weight=0.2", *GAN)
    judge, autoencoder = trainer.discriminator.component, copied(trainer.family.autoencoder)
    batch = trainer.dataset.batch(trainer.sampler.peek())
    figures = trainer.training_step()
    fresh = autoencoder_trainer(tmp_path, "vgt.gan.start_step=0", *GAN)
    assert_identical(copied(fresh.family.autoencoder), autoencoder)
    with torch.no_grad():
        drawn = fresh.family.autoencoder(batch.targets).images
        logits = fresh.discriminator.component(drawn)
        real = fresh.discriminator.component(batch.targets)
    mse = (drawn - batch.targets).square().mean().item()
    assert figures["autoencoder/mse"] == pytest.approx(mse, rel=1e-5)
    assert figures["autoencoder/distillation"] == 0
    assert figures["autoencoder/adversarial"] == pytest.approx(-logits.mean().item(), rel=1e-4)
    assert figures["autoencoder/loss"] == pytest.approx(mse - 0.2 * logits.mean().item(), rel=1e-4)
    hinge = (torch.relu(1 - real).mean() + torch.relu(1 + logits).mean()).item() / 2
    # averages are 0 at first: relu(real - 0)^2 + relu(0 - fake)^2
    lecam = torch.relu(real.mean()).item() ** 2 + torch.relu(-logits.mean()).item() ** 2
    assert figures["discriminator/hinge"] == pytest.approx(hinge, rel=1e-4)
    assert figures["discriminator/loss"] == pytest.approx(hinge + 1e-3 * lecam, rel=1e-4)
    assert trainer.averages.tolist() == pytest.approx(
        [1e-3 * real.mean().item(), 1e-3 * logits.mean().item()], rel=1e-3
    )
    assert judge is trainer.discriminator.component


def test_the_discriminators_rate_is_its_own_counted_from_its_start(tmp_path):
    """A warmup of one step and a line down to 0 at the last, from step 1 on; the autoencoder's where none is named."""
    keys = ["vgt.gan.start_step=1", "vgt.gan.warmup_steps=1", "training.lr_scheduler=linear", "training.max_steps=5"]
    for own, rate in (["vgt.gan.learning_rate=0.01"], 0.01), ([], 1e-3):
        part = autoencoder_trainer(tmp_path, *keys, *GAN, *own).discriminator
        found = [part.learning_rate(step) for step in range(1, 5)]
        assert found == pytest.approx([rate / 2, rate, rate / 2, 0.0], abs=1e-12)


class MeanDistance(torch.nn.Module):
    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return (images - others).abs().flatten(1).mean(1)


def test_each_weight_of_the_configuration_is_that_of_its_term(tmp_path, monkeypatch):
    """In place of VGG a distance that needs no file."""
    monkeypatch.setattr(vgt_autoencoder_trainer, "perceptual_networks", lambda config: (MeanDistance(), None))
    (tmp_path / "vgg.pth").touch()
    keys = [f"vgt.lpips_weights={tmp_path / 'vgg.pth'}", "vgt.perceptual_weight=3", "vgt.kl=true", "vgt.kl_weight=0.25"]
    found = autoencoder_trainer(tmp_path, *keys).training_step()
    terms = {name: found[f"autoencoder/{name}"] for name in ("mse", "lpips", "kl", "distillation")}
    assert terms["lpips"] > 0 and terms["kl"] > 0
    total = terms["mse"] + 3 * terms["lpips"] + 0.25 * terms["kl"] + 0.5 * terms["distillation"]
    assert found["autoencoder/loss"] == pytest.approx(total, rel=1e-5)


def test_the_teacher_stays_bit_for_bit_and_pulls(tmp_path):
    trainer = autoencoder_trainer(tmp_path, *SGD)
    teacher = copied(trainer.family.teacher)
    tower = {f"tower.{name}": value for name, value in copied(trainer.family.autoencoder.tower).items()}
    assert_identical(tower, teacher)
    stepped(trainer, 3)
    assert_identical(copied(trainer.family.teacher), teacher)
    assert trainer.training_step()["autoencoder/distillation"] > 0
    free = autoencoder_trainer(tmp_path, *SGD, "vgt.distillation_weight=0")
    assert "autoencoder/distillation" not in free.training_step()


def test_the_encoder_learns_at_its_share_of_the_rate(tmp_path):
    """One step of SGD moves each weight by rate x gradient, and both runs have the same gradient."""
    moved = {}
    for share in (1.0, 0.25):
        trainer = autoencoder_trainer(tmp_path, *SGD, f"vgt.encoder_rate_ratio={share}")
        before = weights_of(trainer)["autoencoder"]
        after = stepped(trainer, 1)["autoencoder"]
        moved[share] = {name: after[name] - value for name, value in before.items()}
    for name, whole in moved[1.0].items():
        part = 0.25 if name.startswith("tower.encoder.") else 1.0
        # the difference of two fp32 weights is rounded at the size of the weights
        torch.testing.assert_close(moved[0.25][name], part * whole, rtol=1e-5, atol=1e-6)
    assert sum(value.abs().sum() for name, value in moved[1.0].items() if name.startswith("tower.encoder.")) > 0


def test_latents_get_noise_of_a_strength_of_each_images_own(tmp_path):
    trainer = autoencoder_trainer(tmp_path, "vgt.latent_noise=0.3")
    images = torch.rand(2, 3, 32, 32)
    noise, _ = trainer._noise(images, [4, 9])
    plain = normal(3, "vgt/latent noise", [(4,), (9,)], (4, 4, 4))
    strengths = (noise / plain).flatten(1)
    assert (strengths.amax(1) - strengths.amin(1)).max() < 1e-5
    assert 0 < strengths[0, 0] < 0.3 and 0 < strengths[1, 0] < 0.3 and strengths[0, 0] != strengths[1, 0]
    again, _ = trainer._noise(images[:1], [9])
    assert torch.equal(again[0], noise[1]), "named by the place in the run alone"
    assert autoencoder_trainer(tmp_path)._noise(images, [4, 9]) == (None, None)


def test_a_step_draws_the_latents_with_that_noise_and_a_judge_without(tmp_path):
    trainer = autoencoder_trainer(tmp_path, "vgt.latent_noise=3", "vgt.kl=true")
    autoencoder = trainer.family.autoencoder
    images = trainer.dataset.batch(trainer.sampler.peek()).targets
    noise, posterior = trainer._noise(images, [0, 1])
    with torch.no_grad():
        noisy = (autoencoder(images, noise, posterior).images - images).square().mean().item()
        still = (autoencoder(images).images - images).square().mean().item()
        judged = [10 ** (-value / 10) for value in trainer.judge()["autoencoder/psnr"].tolist()]
        drawn = autoencoder(trainer._held_out_images([0, 1, 2])).images.clamp(0, 1)
    assert abs(noisy - still) > 1e-3 * still
    assert trainer.training_step()["autoencoder/mse"] == pytest.approx(noisy, rel=1e-5)
    wanted = (drawn - trainer._held_out_images([0, 1, 2])).square().flatten(1).mean(1).tolist()
    assert judged == pytest.approx(wanted, rel=1e-4)


def test_stage_two_goes_on_from_stage_one_with_its_own_norm(tmp_path):
    first = build_trainer(config_of(tmp_path, "training.max_steps=2"), init_world(True, None))
    teacher = copied(first.family.teacher)
    first.train()
    saved = tmp_path / "run_autoencoder" / "checkpoints" / "step-000002"
    second = autoencoder_trainer(
        tmp_path, f"model.name={saved}", "vgt.channel_norm=true", f"output_dir={tmp_path / 'second'}"
    )
    assert_identical(copied(second.family.autoencoder), copied(first.family.autoencoder))
    assert_identical(copied(second.family.teacher), teacher)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        latents, before = second.family.autoencoder.encode(images), first.family.autoencoder.encode(images)
    centred = before - before.mean(1, keepdim=True)
    # LayerNorm over the 4 channels of each place, by hand
    torch.testing.assert_close(latents, centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt())
    assert "vgt.channel_norm" not in str(second.config) and second.config.vgt.channel_norm


def test_a_run_resumes_bit_for_bit_with_its_discriminator_and_average(tmp_path):
    keys = ["vgt.gan.start_step=1", *GAN, "training.ema.decay=0.9", "training.ema.start_step=1", "vgt.latent_noise=0.1"]
    keys += ["logging.save_interval=2"]
    checkpoints = tmp_path / "run_autoencoder" / "checkpoints"
    build_trainer(config_of(tmp_path, *keys), init_world(True, None)).train()
    whole = load_checkpoint(checkpoints / "step-000004")
    shutil.rmtree(checkpoints / "step-000004")
    resumed = build_trainer(
        config_of(tmp_path, *keys, f"checkpoint.resume_from={checkpoints / 'step-000002'}"), init_world(True, None)
    )
    resumed.train()
    again = load_checkpoint(checkpoints / "step-000004")
    kinds = [kind for kind in whole if kind.startswith(("autoencoder_", "discriminator_"))]
    assert {"autoencoder_ema", "discriminator_optimizer", "discriminator_averages"} <= set(kinds)
    assert_identical({kind: whole[kind] for kind in kinds}, {kind: again[kind] for kind in kinds})


def test_a_run_made_longer_than_up_to_its_discriminator_is_the_long_run(tmp_path):
    keys = ["vgt.gan.start_step=3", *GAN]
    checkpoints = tmp_path / "run_autoencoder" / "checkpoints"
    long = stepped(autoencoder_trainer(tmp_path, *keys), 4)
    build_trainer(config_of(tmp_path, *keys, "training.max_steps=2"), init_world(True, None)).train()
    resume = f"checkpoint.resume_from={checkpoints / 'step-000002'}"
    resumed = build_trainer(config_of(tmp_path, *keys, resume), init_world(True, None))
    resumed.train()
    assert_identical(weights_of(resumed), long)


def test_pipelines_hold_the_average_and_states_the_weights(tmp_path):
    trainer = build_trainer(
        config_of(tmp_path, "training.ema.decay=0.5", "training.max_steps=2"), init_world(True, None)
    )
    trainer.train()
    checkpoint = tmp_path / "run_autoencoder" / "checkpoints" / "step-000002"
    states = load_checkpoint(checkpoint)
    exported = Autoencoder.from_pretrained(checkpoint / "pipeline" / "autoencoder")
    assert_identical(copied(exported), states["autoencoder_ema"])
    assert any(
        not torch.equal(states["autoencoder_weights"][name], value) for name, value in states["autoencoder_ema"].items()
    )
    assert_identical(weights_of(trainer)["autoencoder"], states["autoencoder_weights"])
    Teacher.from_pretrained(checkpoint / "pipeline" / "autoencoder")


def test_chunks_are_the_batch_cut_up(tmp_path):
    """LeCam's penalty too, a square of means over the whole step."""
    keys = ["vgt.gan.start_step=0", "vgt.gan.lecam_weight=1", *GAN, *SGD]
    whole = stepped(autoencoder_trainer(tmp_path, *keys, "training.batch_size=4"))
    parts = stepped(autoencoder_trainer(tmp_path, *keys, "training.gradient_accumulation_steps=2"))
    for part, weights in whole.items():
        for name, value in weights.items():
            torch.testing.assert_close(parts[part][name], value, rtol=0, atol=2e-6)


def test_what_is_judged_is_psnr(tmp_path):
    trainer = autoencoder_trainer(tmp_path)
    found = trainer.judge()
    batch = trainer.held_out.batch([0, 1, 2])
    drawn = trainer.family.draw(["", "", ""], height=32, width=32, seed=0, sampling=None, sources=batch.sources)
    error = (drawn - batch.sources).square().flatten(1).mean(1)
    torch.testing.assert_close(found["autoencoder/psnr"], 10 * torch.log10(1 / error))
    flat = batch.sources.mean((2, 3), keepdim=True).expand_as(batch.sources)
    spread = (flat - batch.sources).square().flatten(1).mean(1)
    torch.testing.assert_close(found["autoencoder/psnr_over_flat"], 10 * torch.log10(spread / error), atol=1e-4, rtol=0)


def test_a_picture_of_one_colour_has_no_figure_over_its_colour(tmp_path, capsys):
    """Nor may an infinite one end the run where it is written down."""
    config_of(tmp_path)
    for name in ("0", "1", "2"):
        Image.new("RGB", (32, 32), (10, 200, 30)).save(tmp_path / "pictures" / f"{name}.png")
    trainer = autoencoder_trainer(tmp_path, "training.max_steps=1")
    trainer.train()
    assert trainer.judge()["autoencoder/psnr_over_flat"].isnan().all()
    told = " ".join(capsys.readouterr().out.split())
    assert "training the autoencoder of tiny-random on 6 pictures: 1 step of 2 pictures" in told
    assert "Judged on 3 training pictures" in told and "pictures before and after, of training pictures:" in told


def test_what_the_folder_holds_loads_again(tmp_path):
    build_trainer(config_of(tmp_path, "training.max_steps=1"), init_world(True, None)).train()
    family = VGT.load(tmp_path / "run_autoencoder" / "checkpoints" / "step-000001")
    assert family.components == ("autoencoder",) and family.own_size() == 32
    with pytest.raises(ValueError, match="an autoencoder alone"):
        family.draw(["a dog"], height=32, width=32, seed=0, sampling=None)
