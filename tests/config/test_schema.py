"""What keys come to together: inheritance, groups, and combinations that cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from glm_training.config import Config, ResolvedOptimizer, RolloutGroup, iter_keys
from tests.config.building import TEXT_REWARD, build, first_paths, issues, reward


@pytest.mark.parametrize(
    ("component", "samples", "plans", "renders", "group"),
    [
        ("ar", None, None, None, (4, 1)),
        ("dit", None, None, None, (1, 4)),
        ("both", None, None, None, (2, 2)),
        ("ar", 6, None, None, (6, 1)),
        ("dit", 6, None, None, (1, 6)),
        ("both", 6, None, None, (3, 2)),
        ("both", None, 3, 4, (3, 4)),
        ("both", 12, 3, 4, (3, 4)),
        ("both", 12, 3, None, (3, 4)),
        ("both", 12, None, 3, (4, 3)),
        ("both", None, 5, None, (5, 2)),
        ("ar", None, 8, None, (8, 1)),
        ("ar", None, None, 2, (4, 2)),
        ("dit", None, 2, None, (2, 4)),
    ],
)
def test_groups(
    component: str, samples: int | None, plans: int | None, renders: int | None, group: tuple[int, int]
) -> None:
    grpo = {} if samples is None else {"num_samples": samples}
    rollout = {"plans_per_prompt": plans, "renders_per_plan": renders}
    config = build(model={"component": component}, rollout=rollout, reward=reward(**grpo))
    assert config.group() == RolloutGroup(*group)
    assert config.reward.grpo.num_samples == group[0] * group[1]


@pytest.mark.parametrize(
    ("component", "samples", "plans", "renders"),
    [
        ("both", 5, None, None),
        ("both", 2, None, None),
        ("both", 4, 2, 3),
        ("both", 4, 3, None),
        ("both", 4, 1, 4),
        ("ar", 4, 1, 4),
        ("ar", 1, None, None),
        ("ar", 2, 4, None),
        ("dit", 4, 4, 1),
        ("dit", 4, None, 8),
    ],
)
def test_impossible_groups(component: str, samples: int, plans: int | None, renders: int | None) -> None:
    rollout = {"plans_per_prompt": plans, "renders_per_plan": renders}
    found = issues(model={"component": component}, rollout=rollout, reward=reward(num_samples=samples))
    assert [issue.paths[0] for issue in found] == ["reward.grpo.num_samples"] * len(found)
    assert len(found) == 1


def test_group_of_one_matters_to_reward_training_only() -> None:
    data = {"target_images_dir": "t"}
    config = build(model={"component": "ar"}, reward=reward(num_samples=1), training={"use_reward": False}, data=data)
    assert not config.uses_reward()


def test_learning_rates() -> None:
    def rates(**training: Any) -> tuple[float, float]:
        config = build(training=training)
        return config.optimizer_for("ar").learning_rate, config.optimizer_for("dit").learning_rate

    assert rates() == (5e-6, 1e-5)
    assert rates(learning_rate=3e-4) == (3e-4, 3e-4)
    assert rates(learning_rate=3e-4, dit_learning_rate=2e-4) == (3e-4, 2e-4)
    assert rates(ar_learning_rate=1e-4) == (1e-4, 1e-5)


def test_optimizer_inheritance() -> None:
    shared = {
        "learning_rate": 1e-3,
        "optimizer": "sgd",
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.0,
        "max_grad_norm": 2.0,
        "lr_scheduler": "cosine_with_restarts",
        "warmup_steps": 7,
        "lr_cycles": 3,
    }
    own: dict[str, Any] = {
        "learning_rate": 2e-3,
        "name": "adamw",
        "beta1": 0.7,
        "beta2": 0.95,
        "epsilon": 1e-7,
        "weight_decay": 0.3,
        "max_grad_norm": 0.0,
        "scheduler": "polynomial",
        "warmup_steps": 0,
        "min_lr_ratio": 0.1,
        "power": 2.0,
    }
    config = build(training=shared, optimizer={"dit": own})
    ar = ResolvedOptimizer("sgd", 1e-3, 0.8, 0.9, 1e-6, 0.0, 2.0, "cosine_with_restarts", 7, 0.0, cycles=3)
    assert config.optimizer_for("ar") == ar
    assert config.optimizer_for("dit") == ResolvedOptimizer(**own, cycles=3)


def test_policy_inheritance() -> None:
    config = build(
        reward={
            **TEXT_REWARD,
            "ar_reward_weight": 0.5,
            "grpo": {
                "kl_coef": 0.1,
                "clip_range": 0.2,
                "clip_range_high": 0.3,
                "dit": {"clip_range": 1e-4, "kl_coef": 0},
            },
        }
    )
    ar, dit = config.policy_for("ar"), config.policy_for("dit")
    assert (ar.reward_weight, ar.kl_coef, ar.clip_low, ar.clip_high, ar.updates_per_rollout) == (0.5, 0.1, 0.2, 0.3, 1)
    assert (dit.reward_weight, dit.kl_coef, dit.clip_low, dit.clip_high) == (1.0, 0.0, 1e-4, 1e-4)


def test_each_half_has_the_kl_coefficient_of_its_unit() -> None:
    """Flow-GRPO's published 0.04 at 10 steps is 0.004 here: its code leaves |dt| = 1/10 out of the variance."""
    published, steps = 0.04, 10
    assert build().policy_for("ar").kl_coef == 0.05
    assert build().policy_for("dit").kl_coef == published / steps
    for method, coefficient in (("nft", 1e-4), ("awm", 3e-3), ("dgpo", 0.02)):
        assert build(reward=reward(dit={"method": method})).policy_for("dit").kl_coef == coefficient
    assert build(reward=reward(dit={"kl_form": "velocity"})).policy_for("dit").kl_coef == 1e-4


def test_a_given_kl_coefficient_is_that_of_both_halves() -> None:
    for coefficient in (0.0, 0.3):
        config = build(reward=reward(kl_coef=coefficient))
        assert config.policy_for("ar").kl_coef == config.policy_for("dit").kl_coef == coefficient
    own = build(reward=reward(kl_coef=0.3, dit={"kl_coef": 0.2}))
    assert (own.policy_for("ar").kl_coef, own.policy_for("dit").kl_coef) == (0.3, 0.2)
    assert build(reward=reward(dit={"kl_coef": None})).policy_for("dit").kl_coef == 0.05


def test_some_token_must_count() -> None:
    weights = {"preview_loss_weight": 0, "large_loss_weight": 0}
    assert first_paths(training=weights) == ["training.preview_loss_weight"]
    build(training=weights | {"large_loss_weight": 1})


def test_a_calculator_in_the_place_of_the_metrics_needs_no_targets() -> None:
    config = build(reward={"calculator": "my_rewards:Brightness"})
    assert config.target_reason() is None
    assert config.has_own_reward()


def test_lora_inheritance() -> None:
    lora = {"enabled": True, "rank": 8, "ar": {"enabled": False}, "dit": {"rank": 4, "dropout": 0.1}}
    assert first_paths(lora=lora) == ["lora.dropout"]  # a replay would draw another mask
    config = build(lora=lora, training={"use_reward": False}, data={"target_images_dir": "targets"})
    assert not config.lora_for("ar").enabled
    dit = config.lora_for("dit")
    assert (dit.enabled, dit.rank, dit.alpha, dit.dropout) == (True, 4, 64.0, 0.1)
    assert dit.targets == ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def test_sampling_inheritance() -> None:
    config = build(
        model={"ar": {"temperature": 0.8}, "dit": {"num_inference_steps": 20, "guidance_scale": 2}},
        rollout={"num_inference_steps": 8, "top_p": 1.0},
        evaluation={"guidance_scale": 3.0},
    )
    rollout, evaluation = config.rollout_sampling(), config.evaluation_sampling()
    assert (rollout.temperature, rollout.top_p, rollout.num_inference_steps, rollout.guidance_scale) == (
        0.8,
        1.0,
        8,
        2.0,
    )
    assert (evaluation.temperature, evaluation.top_p) == (0.8, 0.75)
    assert (evaluation.num_inference_steps, evaluation.guidance_scale) == (20, 3.0)


def test_defaults_of_the_modes() -> None:
    t2i = Config.model_validate({"data": {"target_images_dir": "t"}})
    assert (t2i.training.num_epochs, t2i.training.warmup_steps) == (2, 50)
    assert t2i.reward.metric_weights() == {"lpips": 0.4, "aesthetic": 0.3, "text_accuracy": 0.3}
    assert (t2i.dataset_file(), t2i.data.source_images_dir) == (Path("data/t2i/prompts.txt"), None)
    i2i = Config.model_validate({"training": {"mode": "i2i"}, "data": {"target_images_dir": "t"}})
    assert (i2i.training.num_epochs, i2i.training.warmup_steps) == (10, 500)
    weights = {"lpips": 0.35, "aesthetic": 0.25, "text_accuracy": 0.25, "structure": 0.15}
    assert i2i.reward.metric_weights() == weights
    assert i2i.dataset_file() == Path("data/i2i/prompts.txt")
    assert i2i.data.source_images_dir == Path("data/i2i/source_images")
    assert (t2i.structure_reference(), i2i.structure_reference()) == ("target", "source")
    own = Config.model_validate({"training": {"mode": "i2i", "num_epochs": 3}, "data": {"metadata_file": "m.jsonl"}})
    assert (own.training.num_epochs, own.dataset_file(), own.data.source_images_dir) == (3, Path("m.jsonl"), None)


def test_kernel_follows_the_method() -> None:
    assert build(model={"component": "dit"}).rollout.sde_kernel == "flow"
    assert build(model={"component": "ar"}).rollout.sde_kernel == "ode"
    assert build(reward=reward(dit={"method": "nft"})).rollout.sde_kernel == "ode"
    assert build(reward=reward(dit={"method": "awm"})).rollout.sde_kernel == "ode"
    assert build(reward=reward(dit={"method": "dgpo"})).rollout.sde_kernel == "ode"
    assert build(rollout={"sde_window_size": 3}).rollout.sde_window_strategy == "random"


def test_run_directory() -> None:
    config = build(output_dir="runs/a")
    assert config.checkpoint_dir() == Path("runs/a/checkpoints")
    assert config.tensorboard_dir() == Path("runs/a/tensorboard")
    assert config.lora_dir() == Path("runs/a/lora")
    config = build(checkpoint={"save_dir": "c", "lora_dir": "l"}, logging={"log_dir": "t"})
    assert (config.checkpoint_dir(), config.tensorboard_dir(), config.lora_dir()) == (Path("c"), Path("t"), Path("l"))


def test_sample_interval() -> None:
    assert build(logging={"eval_interval": 7}).logging.sample_every() == 7
    assert build(logging={"sample_interval": 3}).logging.sample_every() == 3
    assert build(logging={"sample_interval": 3, "log_images": False}).logging.sample_every() is None


def test_rewards_off() -> None:
    data = {"target_images_dir": "t"}
    assert build(data=data).uses_reward() and not build(data=data).uses_supervision()
    assert build(data=data, training={"reward_frequency": 2}).uses_supervision()
    assert not build(data=data, reward={"enabled": False}).uses_reward()
    assert build(data=data, training={"use_reward": False}).uses_supervision()
    assert build(data=data, model={"component": "dit"}).parts() == ("dit",)


def test_metrics_in_both_forms() -> None:
    data = {"target_images_dir": "t"}
    weights = {"structure": 0.25, "lpips": 0.75}
    for section in (
        {"metrics": weights},
        {"weights": weights},
        {"metrics": weights, "weights": weights},
        {"metrics": ["structure", "lpips"], "weights": weights},
    ):
        assert build(data=data, reward=section).reward.metric_weights() == weights


@pytest.mark.parametrize(
    ("section", "paths"),
    [
        ({"metrics": ["lpips", "aesthetic"], "weights": {"lpips": 1.0}}, ["reward.metrics"]),
        ({"metrics": ["lpips"]}, ["reward.metrics"]),
        ({"metrics": ["lpips"], "weights": {"lpips": 1, "aesthetic": 1}}, ["reward.weights.aesthetic"]),
        ({"metrics": ["lpips", "lpips"], "weights": {"lpips": 1.0}}, ["reward.metrics"]),
        ({"metrics": {"lpips": 1.0}, "weights": {"lpips": 0.5}}, ["reward.weights"]),
        ({"metrics": {"lpips": 0.0}}, ["reward.metrics.lpips"]),
        ({"weights": {"lpips": -1.0}}, ["reward.weights.lpips"]),
        ({"metrics": {"structure_preservation": 1.0}}, ["reward.metrics.structure_preservation"]),
        ({"metrics": {"my.module": 1.0}}, ["reward.metrics.my.module"]),
        ({"metrics": []}, ["reward.weights"]),
        ({"metrics": {}}, ["reward.metrics"]),
    ],
)
def test_metrics_that_do_not_fit(section: dict[str, Any], paths: list[str]) -> None:
    assert first_paths(data={"target_images_dir": "t"}, reward=section) == paths


def test_held_out_targets_are_asked_for() -> None:
    lpips = {"metrics": {"lpips": 1.0}, "target_images_dir": "t"}
    paths = first_paths(reward=lpips, evaluation={"eval_prompts_file": "p.txt"})
    assert paths == ["evaluation.eval_target_images_dir"]
    build(reward=lpips, evaluation={"eval_prompts_file": "p.jsonl"})
    build(reward=lpips, evaluation={"eval_prompts_file": "p.txt", "enabled": False})
    own = {"metrics": {"rewards.py:Mine": 1.0}}
    build(reward=own, evaluation={"eval_prompts_file": "p.txt"})
    paths = first_paths(reward=own, data={"target_images_dir": "t"}, evaluation={"eval_prompts_file": "p.txt"})
    assert paths == ["evaluation.eval_target_images_dir"]


def test_held_out_sources_are_asked_for_even_where_only_samples_are_drawn() -> None:
    held_out = {"eval_prompts_file": "p.txt", "enabled": False}
    assert first_paths(training={"mode": "i2i"}, evaluation=held_out) == ["evaluation.eval_source_images_dir"]


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("my_rewards:Mine", True),
        ("package.my_rewards:Mine", True),
        ("my_rewards.py:Mine", True),
        ("../some folder/my-rewards.py:Mine", True),
        ("/tmp/my_rewards.py:Mine", True),
        ("my-rewards:Mine", False),
        ("folder/my_rewards:Mine", False),
        ("my_rewards.py", False),
        ("folder/.py:Mine", False),
        ("my_rewards.py:Mine.inner", False),
    ],
)
def test_rewards_of_ones_own_are_named_by_module_or_file(name: str, fits: bool) -> None:
    if fits:
        assert build(reward={"metrics": {name: 1.0}, "calculator": name}).reward.calculator == name
        return
    assert first_paths(reward={"metrics": {name: 1.0}}) == [f"reward.metrics.{name}"]
    with pytest.raises(ValidationError, match="calculator"):
        build(reward={**TEXT_REWARD, "calculator": name})


def test_one_device_per_process_is_what_device_map_takes() -> None:
    for place in (None, "cpu", "cuda", "cuda:1"):
        assert build(model={"device_map": place}).model.device_map == place
    for place in ("auto", "balanced", "sequential", "cuda:", "mps", "cuda:0,cuda:1"):
        with pytest.raises(ValidationError, match="device_map"):
            build(model={"device_map": place})


def test_one_target_folder_serves_both() -> None:
    assert build(reward={**TEXT_REWARD, "target_images_dir": "t"}).target_images_dir() == Path("t")
    assert build(data={"target_images_dir": "t"}).target_images_dir() == Path("t")


def test_accept_takes_keys_and_sections() -> None:
    build(resume={"accept": ["training", "reward.grpo", "seed", "reward.grpo.dit.method"]})


def test_documented_keys_are_all_there() -> None:
    documented = {
        "": "seed output_dir",
        "model": "name component torch_dtype device_map ar.temperature ar.top_p ar.do_sample dit.num_inference_steps "
        "dit.guidance_scale",
        "training": "mode batch_size gradient_accumulation_steps num_epochs max_steps learning_rate ar_learning_rate "
        "dit_learning_rate optimizer adam_beta1 adam_beta2 adam_epsilon weight_decay max_grad_norm lr_scheduler "
        "warmup_steps gradient_checkpointing mixed_precision use_reward reward_frequency",
        "reward": "enabled target_images_dir metrics weights grpo.num_samples grpo.kl_coef grpo.clip_range "
        "ar_reward_weight dit_reward_weight",
        "data": "prompts_file source_images_dir target_images_dir num_workers shuffle pin_memory augmentation "
        "image_size.height image_size.width",
        "distributed": "enabled backend find_unused_parameters",
        "logging": "log_dir log_interval save_interval eval_interval use_tensorboard use_wandb wandb_project "
        "wandb_entity log_images num_log_images",
        "checkpoint": "save_dir resume_from save_total_limit save_optimizer save_lora lora_dir save_lora_only",
        "evaluation": "enabled eval_prompts_file eval_target_images_dir num_eval_samples",
    }
    expected = {f"{section}.{key}".lstrip(".") for section, names in documented.items() for key in names.split()}
    assert expected <= set(iter_keys())


def test_documented_defaults() -> None:
    config = Config.model_validate({"data": {"target_images_dir": "t"}})
    model, training, grpo = config.model, config.training, config.reward.grpo
    assert (model.name, model.torch_dtype) == ("zai-org/GLM-Image", "bfloat16")
    assert (model.ar.temperature, model.ar.top_p) == (0.9, 0.75)
    assert (model.dit.num_inference_steps, model.dit.guidance_scale) == (50, 1.5)
    assert (training.batch_size, training.gradient_accumulation_steps) == (1, 8)
    assert (training.optimizer, training.adam_beta1, training.adam_beta2) == ("adamw", 0.9, 0.999)
    assert (training.adam_epsilon, training.weight_decay, training.max_grad_norm) == (1e-8, 0.01, 1.0)
    assert (training.lr_scheduler, training.gradient_checkpointing) == ("cosine", True)
    assert (grpo.num_samples, grpo.kl_coef, grpo.clip_range) == (4, 0.05, 0.2)
    assert (config.reward.ar_reward_weight, config.reward.dit_reward_weight) == (1.0, 1.0)
    assert (config.data.image_size.height, config.data.image_size.width, config.data.num_workers) == (1024, 1024, 4)
    intervals = config.logging.log_interval, config.logging.save_interval, config.logging.eval_interval
    assert (intervals, config.checkpoint.save_total_limit) == ((10, 500, 100), 3)
