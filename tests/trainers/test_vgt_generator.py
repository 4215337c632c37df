"""VGT's generator on the random tiny model: what it learns from, what stays as it is, and what a run leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from glm_training.algorithms.flow_tokens import token_times
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.models.family import Sampling
from glm_training.models.vgt.family import VGT
from glm_training.models.vgt.generator import Generator
from glm_training.models.vgt.sequence import random_orders
from glm_training.trainers.run import build_trainer
from glm_training.trainers.vgt_generator_trainer import VGTGeneratorTrainer
from glm_training.utils.distributed import init_world
from glm_training.utils.randomness import normal, uniform
from tests.runs import weights_of
from tests.same import assert_identical
from tests.vgt_runs import config_of, stepped, trainer_of

SAMPLING = Sampling(1.0, 1.0, True, 3, 2.0, 4)


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def generator_trainer(folder: Path, *overrides: str) -> VGTGeneratorTrainer:
    trainer = trainer_of(folder, *overrides, component="generator")
    assert isinstance(trainer, VGTGeneratorTrainer)
    return trainer


def test_the_first_loss_is_flow_matching_of_single_tokens(tmp_path):
    """x_t = t x + (1 - t) e under an order, noise and levels named by the places in the run; the head's last layer is 0
    at first, so the loss is the mean of (x - e)^2."""
    trainer = generator_trainer(tmp_path, "vgt.caption_dropout=0")
    batch = trainer.dataset.batch(trainer.sampler.peek())
    latents = trainer.family.autoencoder.encode(batch.targets)
    noise = normal(3, "vgt/noise", [(0,), (1,)], (4, 4, 4))
    expected = (latents - noise).square().mean().item()
    assert trainer.training_step()["generator/loss"] == pytest.approx(expected, rel=1e-5)


def test_every_draw_is_named_by_the_images_place_in_the_run(tmp_path):
    trainer = generator_trainer(tmp_path)
    asked = {}

    def policy(prompts, latents, order, noisy, times):
        asked.update(order=order, noisy=noisy, times=times)
        return trainer.model(prompts, latents, order, noisy, times)

    batch = trainer.dataset.batch([3, 1])
    encoded = trainer._encode(batch)
    trainer._loss(policy, encoded, 3, [(8,), (5,)])
    names = [(8,), (5,)]
    times = token_times(normal(3, "vgt/levels", names, (16,)), 1.4)
    assert torch.equal(asked["order"], random_orders(3, "vgt/order", names, 16))
    assert torch.equal(asked["times"], times)
    clean = encoded.latents.flatten(2).transpose(1, 2)
    noise = normal(3, "vgt/noise", names, (4, 4, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(asked["noisy"], times[..., None] * clean + (1 - times[..., None]) * noise)


def test_captions_are_dropped_by_their_share(tmp_path):
    trainer = generator_trainer(tmp_path, "vgt.caption_dropout=0.4")
    encoded = trainer._encode(trainer.dataset.batch([0, 1, 2, 3]))
    draws = uniform(3, "vgt/caption", [(place,) for place in range(100, 104)], (1,))[:, 0].tolist()
    wanted = ["" if draw < 0.4 else prompt for draw, prompt in zip(draws, encoded.prompts, strict=True)]
    assert trainer._dropped(encoded, [100, 101, 102, 103]).prompts == wanted
    many = uniform(3, "vgt/caption", [(place,) for place in range(4000)], (1,))
    assert abs((many < 0.4).float().mean().item() - 0.4) < 4 * (0.24 / 4000) ** 0.5


def test_a_step_learns_without_the_captions_that_are_dropped(tmp_path):
    trainer = generator_trainer(tmp_path, "training.batch_size=4", "vgt.caption_dropout=0.5")
    draws = uniform(3, "vgt/caption", [(place,) for place in range(4)], (1,))[:, 0].tolist()
    captions = trainer.dataset.batch(trainer.sampler.peek()).prompts
    wanted = ["" if draw < 0.5 else caption for draw, caption in zip(draws, captions, strict=True)]
    assert 0 < wanted.count("") < 4
    read = []
    trainer.model.register_forward_pre_hook(lambda module, given: read.append(given[0].ids))
    trainer.training_step()
    assert torch.equal(read[0], trainer.model.encode_prompts(wanted).ids)


def test_the_autoencoder_and_the_tied_embeddings_stay_bit_for_bit(tmp_path):
    trainer = generator_trainer(tmp_path)
    autoencoder, before = copied(trainer.family.autoencoder), copied(trainer.model)
    stepped(trainer, 3)
    assert_identical(copied(trainer.family.autoencoder), autoencoder)
    after = copied(trainer.model)
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    # the last layers of the head are 0 at first, and let no gradient through to what stands before them in step 1 alone
    assert still == {"llm.embed_tokens.weight"}


def test_a_run_resumes_bit_for_bit_with_its_average(tmp_path):
    keys = ["training.ema.decay=0.9", "logging.save_interval=2"]
    checkpoints = tmp_path / "run_generator" / "checkpoints"
    build_trainer(config_of(tmp_path, *keys, component="generator"), init_world(True, None)).train()
    whole = load_checkpoint(checkpoints / "step-000004")
    shutil.rmtree(checkpoints / "step-000004")
    resume = f"checkpoint.resume_from={checkpoints / 'step-000002'}"
    build_trainer(config_of(tmp_path, *keys, resume, component="generator"), init_world(True, None)).train()
    again = load_checkpoint(checkpoints / "step-000004")
    kinds = [kind for kind in whole if kind.startswith("generator_")]
    assert set(kinds) == {"generator_weights", "generator_optimizer", "generator_ema"}
    assert_identical({kind: whole[kind] for kind in kinds}, {kind: again[kind] for kind in kinds})


def test_finetuning_starts_from_the_average_that_pretraining_left(tmp_path):
    keys = ["training.ema.decay=0.5", "training.max_steps=2"]
    build_trainer(config_of(tmp_path, *keys, component="generator"), init_world(True, None)).train()
    saved = tmp_path / "run_generator" / "checkpoints" / "step-000002"
    average = load_checkpoint(saved)["generator_ema"]
    own = [f"model.name={saved}", "vgt.autoencoder=null", f"output_dir={tmp_path / 'sft'}"]
    trainer = generator_trainer(tmp_path, *own)
    found = weights_of(trainer)["generator"]
    assert_identical({name: found[name] for name in average}, dict(average))
    assert trainer.family.autoencoder.config == VGT.load(tmp_path / "latents").autoencoder.config
    exported = Generator.from_pretrained(saved / "pipeline" / "generator")
    assert torch.equal(exported.queries, average["queries"])


def test_chunks_are_the_batch_cut_up(tmp_path):
    keys = [
        "training.optimizer=sgd",
        "training.adam_beta2=0.999",
        "training.adam_beta1=0",
        "training.max_grad_norm=0",
        "training.learning_rate=0.05",
    ]
    whole = stepped(generator_trainer(tmp_path, *keys, "training.batch_size=4"))
    parts = stepped(generator_trainer(tmp_path, *keys, "training.gradient_accumulation_steps=2"))
    for name, value in whole["generator"].items():
        torch.testing.assert_close(parts["generator"][name], value, rtol=0, atol=2e-6)


def test_alignment_adds_its_weight_of_the_mean_cosine(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=4, image_size=16, num_register_tokens=2)).eval()
    encoder.save_pretrained(tmp_path / "dino")
    trainer = generator_trainer(tmp_path, f"vgt.repa.model={tmp_path / 'dino'}", "vgt.repa.weight=2")
    batch = trainer.dataset.batch([0, 1])
    features = trainer._encode(batch).features
    assert features.shape == (2, 16, 16)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    small = torch.nn.functional.interpolate(batch.targets, size=(16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        seen = encoder(pixel_values=(small - mean[:, None, None]) / std[:, None, None]).last_hidden_state
    torch.testing.assert_close(features, seen[:, 3:])  # behind the class token and two registers
    figures = trainer.training_step()
    total = figures["generator/flow_loss"] + 2 * figures["generator/repa_loss"]
    assert figures["generator/loss"] == pytest.approx(total, rel=1e-5) and -1 <= figures["generator/repa_loss"] <= 1


def written_dino(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    DINOv3ViTModel(DINOv3ViTConfig(**sizes, patch_size=4, image_size=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("aligned_first", [True, False])
def test_finetuning_is_aligned_as_it_says_whatever_pretraining_was(tmp_path, aligned_first):
    """The head for the features goes or comes, and the rest goes on from where it was."""
    repa = f"vgt.repa.model={written_dino(tmp_path / 'dino')}"
    first, second = ([repa], []) if aligned_first else ([], [repa])
    build_trainer(
        config_of(tmp_path, "training.max_steps=1", *first, component="generator"), init_world(True, None)
    ).train()
    saved = tmp_path / "run_generator" / "checkpoints" / "step-000001"
    pretrained = copied(Generator.from_pretrained(saved / "pipeline" / "generator"))
    own = [f"model.name={saved}", "vgt.autoencoder=null", f"output_dir={tmp_path / 'sft'}"]
    trainer = generator_trainer(tmp_path, *own, *second)
    found = copied(trainer.model)
    heads = {name for name in found.keys() | pretrained.keys() if name.startswith("repa_head.")}
    assert_identical({name: found[name] for name in found.keys() - heads},
                     {name: pretrained[name] for name in pretrained.keys() - heads})  # fmt: skip
    assert all((name in found) != aligned_first for name in heads) and len(heads) == 6
    assert ("generator/repa_loss" in trainer.training_step()) != aligned_first
    if aligned_first:
        assert_identical(copied(generator_trainer(tmp_path, *own, *first).model), pretrained)


def test_an_order_is_kept_unless_another_one_is_named(tmp_path):
    keys = ["training.max_steps=1", "vgt.order=raster"]
    build_trainer(config_of(tmp_path, *keys, component="generator"), init_world(True, None)).train()
    saved = tmp_path / "run_generator" / "checkpoints" / "step-000001"
    own = [f"model.name={saved}", "vgt.autoencoder=null", f"output_dir={tmp_path / 'sft'}"]
    for named, wanted in ((None, torch.arange(16)), ("random", random_orders(3, "vgt/order", [(8,), (5,)], 16))):
        trainer = generator_trainer(tmp_path, *own, *([] if named is None else [f"vgt.order={named}"]))
        asked = {}

        def policy(prompts, latents, order, noisy, times, asked=asked, model=trainer.model):
            asked["order"] = order
            return model(prompts, latents, order, noisy, times)

        trainer._loss(policy, trainer._encode(trainer.dataset.batch([3, 1])), 3, [(8,), (5,)])
        assert torch.equal(asked["order"], wanted)
        assert trainer.model.config.order == (named or "raster")
        first = []
        trainer.model.llm.register_forward_pre_hook(
            lambda module, given, named, seen=first: seen.append(named["inputs_embeds"][0, -1]), with_kwargs=True
        )
        trainer.family.draw(["a"], height=32, width=32, seed=5, sampling=Sampling(1.0, 1.0, True, 2, 1.0, 1))
        place = 0 if named is None else random_orders(5, "generate/order", [(0, 0)], 16)[0, 0]
        assert place or named is None
        assert torch.equal(first[0], trainer.model.grids((4, 4))[0][0, place]), "the query it begins with"


def test_a_generator_draws_at_the_size_it_was_trained_on(tmp_path):
    """Not at that of its autoencoder, which draws any size; and a new one in memory has the places it needs."""
    size = ["data.image_size.height=128", "data.image_size.width=128", "data.min_side=1"]
    build_trainer(
        config_of(tmp_path, "training.max_steps=1", *size, component="generator"), init_world(True, None)
    ).train()
    family = VGT.load(tmp_path / "run_generator" / "checkpoints" / "step-000001")
    assert family.generator.config.grid == (16, 16) and family.own_size() == 128


def test_a_picture_depends_on_its_own_prompt_and_name_alone(tmp_path):
    family = trainer_of(tmp_path, component="generator").family
    family.eval()
    options = {"height": 32, "width": 32, "seed": 5, "sampling": SAMPLING}
    both = family.draw(["a dog", "a red circle on a sign"], prompt_ids=[7, 9], samples=2, **options)
    assert both.shape == (4, 3, 32, 32) and 0 <= both.min() and both.max() <= 1
    one = family.draw(["a red circle on a sign"], prompt_ids=[9], samples=2, micro_batch_size=1, **options)
    torch.testing.assert_close(one, both[2:], atol=1e-5, rtol=0)
    assert (both[2] - both[3]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="multiples of 8 px"):
        family.draw(["a dog"], **options | {"height": 36})
    with pytest.raises(ValueError, match="this VGT has a generator, which draws prompts"):
        family.draw(["a dog"], sources=torch.rand(1, 3, 32, 32), **options)
