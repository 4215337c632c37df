"""Keys that are valid one by one and cannot be meant together."""

from __future__ import annotations

from typing import Any

import pytest

from glm_training.config.checks.cross_field import cross_field_issues
from tests.config.building import TEXT_REWARD, build, first_paths, issues, reward


@pytest.mark.parametrize(
    ("path", "sections"),
    [
        (
            "data.target_images_dir",
            {"data": {"target_images_dir": "a"}, "reward": {**TEXT_REWARD, "target_images_dir": "b"}},
        ),
        ("data.target_images_dir", {"reward": {"metrics": {"lpips": 1.0}}}),
        ("data.target_images_dir", {"reward": {"metrics": {"structure": 1.0}}}),
        ("data.target_images_dir", {"training": {"use_reward": False}}),
        ("data.target_images_dir", {"training": {"reward_frequency": 2}}),
        ("data.metadata_file", {"data": {"metadata_file": "m.jsonl", "prompts_file": "p.txt"}}),
        ("data.source_images_dir", {"data": {"source_images_dir": "s"}}),
        ("model.ar.do_sample", {"model": {"component": "ar", "ar": {"do_sample": False}}}),
        ("rollout.sde_kernel", {"model": {"component": "dit"}, "rollout": {"sde_kernel": "ode"}}),
        ("rollout.eta", {"rollout": {"sde_kernel": "cps", "eta": 1.5}}),
        ("rollout.sde_window_size", {"rollout": {"sde_window_size": 9, "num_inference_steps": 8}}),
        ("rollout.sde_window_size", {"rollout": {"sde_window_size": 8, "num_inference_steps": 8, "sde_kernel": "cps"}}),
        ("rollout.sde_window_strategy", {"rollout": {"sde_window_strategy": "random"}}),
        ("rollout.sde_window_strategy", {"rollout": {"sde_window_strategy": "all", "sde_window_size": 2}}),
        ("rollout.sde_window_range", {"rollout": {"sde_window_range": [2, 9], "num_inference_steps": 8}}),
        ("rollout.sde_window_range", {"rollout": {"sde_window_range": [2]}}),
        (
            "rollout.sde_window_size",
            {"rollout": {"sde_window_range": [2, 5], "sde_window_size": 4, "num_inference_steps": 8}},
        ),
        (
            "rollout.sde_window_range",
            {"rollout": {"sde_window_range": [7, 8], "num_inference_steps": 8, "sde_kernel": "cps"}},
        ),
        ("rollout.sde_kernel", {"reward": reward(dit={"method": "nft"}), "rollout": {"sde_kernel": "cps"}}),
        ("rollout.branch", {"reward": reward(dit={"method": "awm"}), "rollout": {"branch": True}}),
        ("rollout.branch", {"model": {"component": "ar"}, "rollout": {"branch": True}}),
        ("reward.grpo.dit.ratio", {"reward": reward(dit={"method": "nft", "ratio": "guard"})}),
        (
            "reward.grpo.dit.divergence_threshold",
            {"reward": reward(dit={"method": "awm", "divergence_threshold": 1e-3})},
        ),
        ("reward.grpo.dit.noise_weighting", {"reward": reward(dit={"method": "nft", "noise_weighting": True})}),
        ("reward.grpo.dit.noise_weighting", {"reward": reward(dit={"ratio": "guard", "noise_weighting": True})}),
        ("reward.grpo.dit.kl_form", {"reward": reward(dit={"method": "awm", "kl_form": "velocity"})}),
        ("reward.grpo.dit.kl_form", {"reward": reward(dit={"kl_coef": 0.0, "kl_form": "velocity"})}),
        ("reward.grpo.dit.timesteps_per_sample", {"reward": reward(dit={"timesteps_per_sample": 2})}),
        ("reward.grpo.ar.preview_weight", {"reward": reward(ar={"preview_weight": 0, "large_weight": 0})}),
        ("reward.ar.weights", {"reward": TEXT_REWARD | {"ar": {"weights": {}}}}),
        (
            "reward.ar.weights",
            {"reward": TEXT_REWARD | {"calculator": "a:B", "ar": {"weights": {"text_accuracy": 1.0}}}},
        ),
        ("reward.grpo.dit.huber", {"reward": reward(dit={"huber": 0.1})}),
        ("reward.grpo.dit.dgpo_beta", {"reward": reward(dit={"method": "awm", "dgpo_beta": 10})}),
        ("reward.grpo.dit.compared_with", {"reward": reward(dit={"method": "dgpo", "compared_with": "prompt"})}),
        ("reward.grpo.dit.noisiest_share", {"reward": reward(dit={"method": "nft", "noisiest_share": 0.5})}),
        ("rollout.sde_kernel", {"reward": reward(dit={"method": "dgpo"}), "rollout": {"sde_kernel": "cps"}}),
        (
            "rollout.micro_batch_size",
            {"reward": reward(dit={"method": "dgpo"}, num_samples=8), "rollout": {"micro_batch_size": 3}},
        ),
        ("reward.grpo.dit.old_decay", {"reward": reward(dit={"old_decay": 0.5})}),
        ("reward.grpo.dit.nft_beta", {"reward": reward(dit={"method": "awm", "nft_beta": 0.1})}),
        (
            "reward.grpo.ar.similarity_weighting",
            {"model": {"component": "dit"}, "reward": reward(ar={"similarity_weighting": True})},
        ),
        (
            "reward.grpo.ar.entropy_reward",
            {"model": {"component": "dit"}, "reward": reward(ar={"entropy_reward": 0.4})},
        ),
        (
            "reward.grpo.ar.entropy_reward",
            {"reward": reward(ar={"entropy_reward": 0.4}) | {"combine": "gdpo"}},
        ),
        ("reward.grpo.ar.cispo_cap", {"reward": reward(ar={"cispo_cap": 2.0})}),
        ("reward.grpo.reference", {"reward": reward(reference="ema", kl_coef=0.0)}),
        ("reward.grpo.reference_decay", {"reward": reward(reference_decay=0.5)}),
        ("rollout.sde_window_size", {"reward": reward(dit={"method": "nft"}), "rollout": {"sde_window_size": 2}}),
        ("reward.dit.weights.text_acuracy", {"reward": TEXT_REWARD | {"dit": {"weights": {"text_acuracy": 1.0}}}}),
        ("checkpoint.save_lora", {"checkpoint": {"save_lora": True}}),
        ("checkpoint.save_lora_only", {"checkpoint": {"save_lora_only": True}}),
        ("evaluation.eval_target_images_dir", {"evaluation": {"eval_target_images_dir": "t"}}),
        ("evaluation.eval_source_images_dir", {"evaluation": {"eval_prompts_file": "p"}, "training": {"mode": "i2i"}}),
        (
            "dmdr.reward.method",
            {
                "training": {"method": "dmdr"},
                "model": {"component": "dit"},
                "reward": {"enabled": False},
                "dmdr": {
                    "cold_start_steps": 1,
                    "reward": {"method": "srpo", "decoder": "vae", "weights": {"clip_h": 1.0}},
                },
            },
        ),
        ("resume.accept", {"resume": {"accept": ["training.max_stps"]}}),
    ],
)
def test_combinations_that_cannot_be_meant(path: str, sections: dict[str, Any]) -> None:
    assert first_paths(**sections) == [path]


def test_where_no_pictures_are_given_both_ways_are_told() -> None:
    (found,) = issues(training={"use_reward": False})
    assert found.suggestion is not None and found.suggestion.startswith("Set it, as in `data/t2i/target_images`. ")
    assert "captioned pictures give their folder as `data.images` alone" in found.suggestion


def test_trackio_online_needs_its_space() -> None:
    online = {"use_trackio": True, "trackio_mode": "online"}
    assert first_paths(logging=online) == ["logging.trackio_space"]
    for logging in ({**online, "trackio_space": "me/runs"}, {**online, "use_trackio": False}, {"use_trackio": True}):
        assert not cross_field_issues(build(logging=logging))
