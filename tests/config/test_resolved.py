"""What each half is trained, drawn and rewarded with: its own keys, then those of both, then the documented default."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.config.sections.resolved import RolloutGroup, split_group
from tests.runs import config_of

ADAM = ["training.optimizer=adamw", "training.adam_beta1=0.8", "training.adam_beta2=0.9", "training.adam_epsilon=1e-6"]
SHARED = [*ADAM, "training.weight_decay=0.2", "training.max_grad_norm=3", "training.warmup_steps=4"]
OWN = {
    "name": "muon", "learning_rate": 0.5, "beta1": 0.1, "beta2": 0.2, "epsilon": 0.3, "weight_decay": 0.4,
    "max_grad_norm": 0.6, "scheduler": "linear", "warmup_steps": 7, "min_lr_ratio": 0.25,
}  # fmt: skip


def test_a_half_takes_its_own_optimizer_key_by_key(tmp_path):
    config = config_of(tmp_path, *SHARED, *(f"optimizer.dit.{key}={value}" for key, value in OWN.items()))
    ar, dit = config.optimizer_for("ar"), config.optimizer_for("dit")
    assert {key: getattr(dit, key) for key in OWN} == OWN
    assert (ar.name, ar.learning_rate, ar.scheduler, ar.min_lr_ratio) == ("adamw", 0.05, "constant", 0.0)
    assert (ar.beta1, ar.beta2, ar.epsilon) == (0.8, 0.9, 1e-6)
    assert (ar.weight_decay, ar.max_grad_norm, ar.warmup_steps) == (0.2, 3, 4)


def test_learning_rates_go_from_the_nearest_key_to_the_documented_one(tmp_path):
    def rates(*keys: str) -> list[float]:
        config = config_of(tmp_path, *keys)
        return [config.optimizer_for("ar").learning_rate, config.optimizer_for("dit").learning_rate]

    assert rates("training.learning_rate=null") == [5e-6, 1e-5]
    assert rates("training.ar_learning_rate=0.3") == [0.3, 0.05]
    assert rates("training.ar_learning_rate=0.3", "optimizer.ar.learning_rate=0.7") == [0.7, 0.05]
    assert rates("training.dit_learning_rate=0.2") == [0.05, 0.2]


def test_a_halfs_clip_is_its_own_and_symmetric_unless_told(tmp_path):
    def clip(part: str, *keys: str) -> tuple[float, float]:
        policy = config_of(tmp_path, *(f"reward.grpo.{key}" for key in keys)).policy_for(part)
        return policy.clip_low, policy.clip_high

    both = ("clip_range=0.1", "clip_range_high=0.3")
    assert clip("ar", "clip_range=0.1") == (0.1, 0.1) and clip("ar", *both) == (0.1, 0.3)
    assert clip("dit", *both, "dit.clip_range=0.2") == (0.2, 0.2) and clip("ar", *both, "dit.clip_range=0.2") == (
        0.1,
        0.3,
    )
    assert clip("ar", *both, "ar.clip_range=0.2", "ar.clip_range_high=0.4") == (0.2, 0.4)
    assert clip("ar", *both, "ar.clip_range_high=0.4") == (0.1, 0.4)


def test_policies_differ_by_half(tmp_path):
    keys = ["reward.ar_reward_weight=2", "reward.dit_reward_weight=3", "reward.grpo.updates_per_rollout=2"]
    own = [
        "reward.grpo.dit.updates_per_rollout=4",
        "reward.grpo.dit.advantage_scale=batch",
        "reward.grpo.ar.kl_coef=0.7",
    ]
    config = config_of(tmp_path, *keys, *own)
    ar, dit = config.policy_for("ar"), config.policy_for("dit")
    assert (ar.reward_weight, ar.updates_per_rollout, ar.advantage_scale, ar.kl_coef) == (2, 2, "group", 0.7)
    assert (dit.reward_weight, dit.updates_per_rollout, dit.advantage_scale) == (3, 4, "batch")


def test_metrics_of_one_half_are_scored_and_count_for_it_alone(tmp_path):
    config = config_of(tmp_path, "reward.metrics={structure: 2.0}", "reward.dit.weights={lpips: 0.5}")
    assert config.reward_weights_for("ar") is None and config.reward_weights_for("dit") == {"lpips": 0.5}
    assert config.scored_weights() == {"lpips": 0.0, "structure": 2.0}
    only = config_of(
        tmp_path,
        "reward.metrics=null",
        "reward.ar.weights={lpips: 0.5, structure: 0.1}",
        "reward.dit.weights={lpips: 2}",
    )
    assert only.reward.metric_weights() == {"lpips": 2, "structure": 0.1}, "each at the larger of its weights"


def test_one_half_alone_is_trained_with_a_file_for_both(tmp_path):
    """train_ar.py and train_dit.py take the same file: what it says of the other half waits."""
    keys = ["reward.metrics={structure: 1}", "reward.ar.weights={lpips: 1}", "reward.dit.weights={text_accuracy: 1}"]
    config = config_of(tmp_path, "model.component=ar", *keys)
    assert config.parts() == ("ar",) and config.reward_weights_for("ar") == {"lpips": 1}
    assert config.scored_weights() == {"structure": 1, "lpips": 0}, "nothing is scored that nobody learns from"
    assert config.reward_weights_for("dit") is None, "what is not scored weighs nothing"


def test_adapters_differ_by_half(tmp_path):
    keys = ["lora.rank=4", "lora.alpha=6", "lora.ar.enabled=true", "lora.ar.rank=2", "lora.ar.alpha=5"]
    config = config_of(tmp_path, *keys, "lora.dit_targets=[to_q]", "lora.ar_targets=[v_proj]")
    ar, dit = config.lora_for("ar"), config.lora_for("dit")
    assert (ar.enabled, ar.rank, ar.alpha, ar.targets) == (True, 2, 5, ("v_proj",))
    assert (dit.enabled, dit.rank, dit.alpha, dit.targets) == (False, 4, 6, ("to_q",))


def test_rollouts_and_evaluations_draw_with_their_own_keys_or_the_models(tmp_path):
    model = ["model.ar.temperature=0.6", "model.ar.top_p=0.4", "model.dit.num_inference_steps=9"]
    guided = ["model.dit.guidance_scale=2", "model.ar.do_sample=true"]
    plain = config_of(tmp_path, *model, *guided)
    for sampling in (plain.rollout_sampling(), plain.evaluation_sampling()):
        assert (sampling.temperature, sampling.top_p, sampling.do_sample) == (0.6, 0.4, True)
        assert (sampling.num_inference_steps, sampling.guidance_scale) == (9, 2)
    own = ["rollout.temperature=0.7", "rollout.top_p=0.5", "rollout.num_inference_steps=4", "rollout.guidance_scale=3"]
    held_out = ["evaluation.num_inference_steps=5", "evaluation.guidance_scale=4"]
    config = config_of(tmp_path, *model, *guided, *own, *held_out)
    rollout, evaluation = config.rollout_sampling(), config.evaluation_sampling()
    assert (rollout.temperature, rollout.top_p) == (0.7, 0.5) and (evaluation.temperature, evaluation.top_p) == (
        0.6,
        0.4,
    )
    assert (rollout.num_inference_steps, rollout.guidance_scale) == (4, 3)
    assert (evaluation.num_inference_steps, evaluation.guidance_scale) == (5, 4)


@pytest.mark.parametrize(
    ("keys", "rewards", "supervision"),
    [
        ([], True, False),
        (["training.use_reward=false"], False, True),
        (["reward.enabled=false"], False, True),
        (["training.reward_frequency=2"], True, True),
    ],
)
def test_steps_are_rewarded_supervised_or_both(tmp_path, keys, rewards, supervision):
    config = config_of(tmp_path, *keys)
    assert (config.uses_reward(), config.uses_supervision()) == (rewards, supervision)
    assert config.parts() == ("ar", "dit")


@pytest.mark.parametrize(
    ("component", "plans", "renders", "group"),
    [
        ("ar", None, None, RolloutGroup(12, 1)),
        ("dit", None, None, RolloutGroup(1, 12)),
        ("both", None, None, RolloutGroup(6, 2)),
        ("both", 4, None, RolloutGroup(4, 3)),
        ("both", None, 4, RolloutGroup(3, 4)),
        ("both", 3, 4, RolloutGroup(3, 4)),
        ("both", 5, None, None),
        ("both", 3, 3, None),
    ],
)
def test_images_of_a_prompt_are_plans_times_renders(component, plans, renders, group):
    assert split_group(component, 12, plans, renders) == group


def test_given_plans_and_renders_say_how_many_images(tmp_path):
    config = config_of(tmp_path, "rollout.plans_per_prompt=3", "rollout.renders_per_plan=4")
    assert config.reward.grpo.num_samples == 12 and config.group() == RolloutGroup(3, 4)


def test_defaults_follow_mode_and_method(tmp_path):
    plain = config_of(tmp_path, "reward.metrics=null")
    assert plain.reward.metric_weights() == {"lpips": 0.4, "aesthetic": 0.3, "text_accuracy": 0.3}
    edits = config_of(tmp_path, "reward.metrics=null", mode="i2i")
    assert edits.reward.metric_weights() == {
        "lpips": 0.35, "aesthetic": 0.25, "text_accuracy": 0.25, "structure": 0.15
    }  # fmt: skip
    assert (plain.training.num_epochs, edits.training.num_epochs) == (2, 10)
    assert (plain.rollout.sde_kernel, plain.rollout.sde_window_strategy) == ("flow", "all")
    assert config_of(tmp_path, "model.component=ar").rollout.sde_kernel == "ode"
    assert config_of(tmp_path, "reward.grpo.dit.method=nft").rollout.sde_kernel == "ode"
    assert config_of(tmp_path, "rollout.sde_window_size=1").rollout.sde_window_strategy == "random"


def test_folders_are_below_the_run_unless_they_are_given(tmp_path):
    config = config_of(tmp_path)
    run = config.output_dir
    assert (config.checkpoint_dir(), config.lora_dir()) == (run / "checkpoints", run / "lora")
    own = config_of(tmp_path, "checkpoint.save_dir=a", "checkpoint.lora_dir=b", "reward.target_images_dir=null")
    assert (own.checkpoint_dir(), own.lora_dir()) == (Path("a"), Path("b"))
    assert own.target_images_dir() == tmp_path / "data" / "target_images"


def test_structure_compares_with_the_source_in_edits(tmp_path):
    keys = ["reward.options.structure.reference=null"]
    assert config_of(tmp_path, *keys).structure_reference() == "target"
    assert config_of(tmp_path, *keys, mode="i2i").structure_reference() == "source"
