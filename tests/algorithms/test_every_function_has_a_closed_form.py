"""Each public function of the algorithms, and the test that checks it against a closed form or numbers by hand."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALGORITHMS = ROOT / "glm_training" / "algorithms"

CLOSED_FORMS = {
    "adversarial.hinge_discriminator_loss": "algorithms/test_adversarial.py::test_discriminator_by_hand",
    "adversarial.hinge_generator_loss": "algorithms/test_adversarial.py::test_generator_by_hand",
    "adversarial.lecam_penalty": "algorithms/test_adversarial.py::test_lecam_by_hand",
    "adversarial.update_averages": "algorithms/test_adversarial.py::test_averages_by_hand",
    "advantages.group_advantages": "algorithms/test_advantages.py::test_group_scale_by_hand",
    "advantages.combine_rewards": "algorithms/test_advantages.py::test_gdpo_by_hand",
    "advantages.mean_over_renders": "algorithms/test_credit_tree.py::"
    "test_plans_with_the_same_rewards_in_another_order_are_equal",
    "advantages.plan_render_advantages": "algorithms/test_advantages.py::test_tree_by_hand",
    "advantages.plan_render_gdpo": "algorithms/test_advantages.py::test_gdpo_tree_by_hand",
    "awm.matching_log_density": "algorithms/test_awm.py::test_by_hand",
    "awm.velocity_kl": "algorithms/test_awm.py::test_by_hand",
    "dgpo.group_preference_loss": "algorithms/test_dgpo.py::test_by_hand",
    "distillation.distribution_matching_loss": "algorithms/test_distillation.py::test_distribution_matching_by_hand",
    "distillation.guidance_scale_decay": "algorithms/test_distillation.py::test_guidance_scale_at_its_ends_and_middle",
    "distillation.renoise_beta": "algorithms/test_distillation.py::test_renoise_beta_means",
    "distillation.reward_hinge": "algorithms/test_distillation.py::test_hinge_by_hand",
    "distillation.srpo_text_feature": "algorithms/test_distillation.py::test_srpo_feature_by_hand",
    "flow_matching.interpolate": "algorithms/test_flow_matching.py::test_path_ends_and_sigma_forms",
    "flow_matching.velocity_target": "algorithms/test_flow_matching.py::test_path_and_velocity_are_consistent",
    "flow_matching.shift_sigma": "algorithms/test_flow_matching.py::test_shift_takes_a_mu_per_sample",
    "flow_matching.sample_timestep_density": "algorithms/test_flow_matching.py::test_densities",
    "flow_matching.flow_matching_loss": "algorithms/test_flow_matching.py::test_loss_by_hand",
    "flow_sde.sde_transition": "parity/test_flow_sde_marginals.py::test_final_std",
    "flow_sde.sde_step": "algorithms/test_flow_sde.py::test_log_prob_is_the_mean_normal_log_prob",
    "flow_sde.gaussian_kl": "algorithms/test_flow_sde.py::test_gaussian_kl_is_the_divergence_per_dim",
    "flow_sde.guard_log_ratio": "algorithms/test_trust_region.py::"
    "test_guard_log_ratio_is_the_mean_of_noise_times_shift_at_every_std",
    "flow_sde.divergence_mask": "algorithms/test_trust_region.py::test_divergence_mask_drops_only_what_runs_away",
    "flow_sde.noise_weights": "algorithms/test_flow_sde.py::test_noise_weights_are_the_stds_over_their_mean",
    "flow_sde.sde_window": "algorithms/test_sde_window.py::test_decay_leaves_later_windows_sooner",
    "flow_tokens.channel_norm": "algorithms/test_flow_tokens.py::test_channel_norm_by_hand",
    "flow_tokens.guidance_weight": "algorithms/test_flow_tokens.py::test_guidance_fades_by_hand",
    "flow_tokens.integrate": "algorithms/test_flow_tokens.py::test_one_known_point_is_reached_exactly",
    "flow_tokens.noised": "algorithms/test_flow_tokens.py::test_path_and_target_by_hand",
    "flow_tokens.sde_step": "algorithms/test_flow_tokens.py::test_a_step_by_hand",
    "flow_tokens.token_times": "algorithms/test_flow_tokens.py::test_times_by_hand",
    "nft.nft_loss": "algorithms/test_nft.py::test_by_hand",
    "nft.old_policy_decay": "algorithms/test_nft.py::test_decay_schedules",
    "policy_loss.policy_loss": "algorithms/test_policy_loss.py::test_aggregations_by_hand",
    "preference.diffusion_dpo_loss": "algorithms/test_preference.py::test_diffusion_by_hand",
    "preference.sequence_dpo_loss": "algorithms/test_preference.py::test_sequence_by_hand",
    "preference.min_snr_weights": "algorithms/test_preference.py::test_min_snr_by_hand",
    "stage.token_similarity": "algorithms/test_stage.py::"
    "test_a_token_is_compared_with_those_at_its_place_of_plans_that_fared_otherwise",
    "stage.similarity_weights": "algorithms/test_stage.py::test_weights_by_hand",
    "stage.entropy_bonus": "algorithms/test_stage.py::test_the_entropy_reward_parts_plans_that_share_the_best_reward",
}
"""module.function -> file::test under tests/; a function's other tests stand in the same file."""


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def called_by(name: str, functions: dict[str, ast.FunctionDef], seen: set[str]) -> set[str]:
    """Every name that `name` calls, also through other functions of its file."""
    seen.add(name)
    nodes = ast.walk(functions[name])
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    for inner in (called & functions.keys()) - seen:
        called |= called_by(inner, functions, seen)
    return called


def test_the_list_is_complete() -> None:
    public = {
        f"{path.stem}.{name}"
        for path in ALGORITHMS.glob("[!_]*.py")
        for name in functions_of(path)
        if not name.startswith("_")
    }
    assert public == CLOSED_FORMS.keys()


@pytest.mark.parametrize("function", sorted(CLOSED_FORMS))
def test_the_test_is_there_and_calls_the_function(function: str) -> None:
    file, _, test = CLOSED_FORMS[function].partition("::")
    functions = functions_of(ROOT / "tests" / file)
    assert test in functions, f"{file} has no {test}"
    assert function.partition(".")[2] in called_by(test, functions, set())
