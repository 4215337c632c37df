"""What a configuration makes of a family: which weights are trained, in which type, beside which slow copies."""

from __future__ import annotations

import pytest
import torch

from glm_training.engine import setup
from glm_training.engine.evaluations import evaluation_settings
from glm_training.engine.families import build_family
from glm_training.models.lora import ADAPTER, has_lora
from glm_training.utils.distributed import World
from tests.runs import config_of


def built(tmp_path, *overrides: str):
    config = config_of(tmp_path, *overrides)
    family = build_family(config, World())
    return family, setup.build_parts(config, family, World(), 10)


def test_trained_weights_are_fp32_and_the_others_as_asked(tmp_path):
    family, parts = built(tmp_path, "model.component=dit", "model.torch_dtype=bfloat16")
    assert list(parts) == ["dit"] and parts["dit"].component is family.dit
    assert {value.dtype for value in parts["dit"].parameters.values()} == {torch.float32}
    assert all(value.requires_grad for value in parts["dit"].parameters.values())
    assert {value.dtype for value in family.ar.parameters()} == {torch.bfloat16}
    assert not any(value.requires_grad for value in family.ar.parameters())


def test_adapters_have_the_rank_and_strength_of_their_half(tmp_path):
    keys = ["lora.enabled=true", "lora.rank=4", "lora.alpha=6", "lora.dit.rank=2", "lora.dit.alpha=5"]
    family, parts = built(tmp_path, *keys, "lora.dropout=0.25", "training.use_reward=false")
    for name, rank, strength in (("ar", 4, 1.5), ("dit", 2, 2.5)):
        layer = next(module for module in family.module(name).modules() if getattr(module, "lora_A", None))
        assert layer.lora_A[ADAPTER].weight.shape[0] == rank and layer.scaling[ADAPTER] == strength
        assert layer.lora_dropout[ADAPTER].p == 0.25
        assert all("lora_" in key for key in parts[name].parameters)


def test_activations_are_recomputed_where_asked(tmp_path):
    for asked in (True, False):
        family, _ = built(tmp_path, "model.component=dit", f"training.gradient_checkpointing={asked}".lower())
        assert family.dit.transformer.is_gradient_checkpointing is asked


@pytest.mark.parametrize(
    ("keys", "reference", "average", "old"),
    [
        ([], True, False, False),
        (["reward.grpo.kl_coef=0"], False, False, False),
        (["reward.grpo.dit.method=dgpo", "reward.grpo.kl_coef=0"], True, False, False),
        (["reward.grpo.reference=ema"], True, True, False),
        (["reward.grpo.dit.method=nft", "reward.grpo.kl_coef=0"], False, False, True),
        (["lora.enabled=true"], True, False, False),
        (["lora.enabled=true", "reward.grpo.reference=ema"], True, True, False),
        (["training.use_reward=false", "reward.grpo.dit.method=nft"], False, False, False),
    ],
)
def test_slow_copies_are_kept_where_a_method_asks(tmp_path, keys, reference, average, old):
    _, parts = built(tmp_path, "model.component=dit", *keys)
    part = parts["dit"]
    assert (part.reference is not None, part.average is not None, part.old is not None) == (reference, average, old)


def test_an_entropy_reward_keeps_a_reference_of_the_ar_half(tmp_path):
    _, parts = built(tmp_path, "reward.grpo.ar.entropy_reward=0.4", "reward.grpo.kl_coef=0")
    assert parts["ar"].reference is not None and parts["dit"].reference is None


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_model_as_it_was_built(tmp_path, lora):
    family, parts = built(tmp_path, "model.component=dit", f"lora.enabled={lora}".lower())
    part = parts["dit"]
    assert has_lora(family.dit.transformer) is lora
    condition = family.dit.condition(["a"], torch.zeros(1, 4, dtype=torch.long), (2, 2))
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0]), condition
    with torch.no_grad():
        start = family.dit(*given)
        for value in part.parameters.values():
            value.add_(0.05)
        moved = family.dit(*given)
        with part.as_reference():
            torch.testing.assert_close(family.dit(*given), start)
    assert (moved - start).abs().max() > 1e-4


def test_only_fp16_scales_its_loss_and_autocasts_as_named(tmp_path):
    for name, dtype in (("no", None), ("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config = config_of(tmp_path, "model.component=dit", f"training.mixed_precision={name}")
        with setup.autocast(config, World()):
            found = torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype
        assert found == (dtype or torch.float32)
        part = setup.build_parts(config, build_family(config, World()), World(), 10)["dit"]
        assert part.scaler.is_enabled() == (name == "fp16")


def test_a_pass_without_gradient_takes_none_from_the_next(tmp_path):
    """As the reference's before the trained one; torch 2.8 hands on the cast of a weight that it made without."""
    layer = torch.nn.Linear(2, 2)
    with setup.autocast(config_of(tmp_path, "training.mixed_precision=bf16"), World()):
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2)).float().sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))


def test_held_out_prompts_are_the_first_of_the_data_unless_given(tmp_path):
    config = config_of(tmp_path, "evaluation.num_eval_samples=3", "data.augmentation=true")
    training = setup.build_dataset(config)
    held_out = setup.build_evaluation_dataset(config, training)
    assert [example.prompt for example in held_out.examples] == [example.prompt for example in training.examples[:3]]
    (tmp_path / "own.txt").write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    own = config_of(tmp_path, "evaluation.num_eval_samples=2", f"evaluation.eval_prompts_file={tmp_path}/own.txt")
    assert [example.prompt for example in setup.build_evaluation_dataset(own, training).examples] == ["one", "two"]
    for dataset, flips in ((training, True), (held_out, False)):
        pictures = [dataset.batch([0], epoch=[epoch]).targets for epoch in range(10)]
        assert any(not torch.equal(picture, pictures[0]) for picture in pictures) is flips


def test_evaluations_draw_as_the_configuration_says(tmp_path):
    keys = {
        "evaluation.samples_per_prompt": 3,
        "evaluation.seed": 7,
        "evaluation.num_inference_steps": 5,
        "evaluation.guidance_scale": 2.5,
        "rollout.micro_batch_size": 2,
        "data.image_size": "{height: 64, width: 96}",
    }
    found = evaluation_settings(config_of(tmp_path, *(f"{key}={value}" for key, value in keys.items())), (64, 96))
    assert (found.samples, found.seed, found.micro_batch_size, found.height, found.width) == (3, 7, 2, 64, 96)
    assert (found.sampling.num_inference_steps, found.sampling.guidance_scale) == (5, 2.5)
    assert (found.sampling.temperature, found.sampling.top_p) == (0.9, 0.75)
