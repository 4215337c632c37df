"""What a reinforcement method and the sampling of its rollouts ask of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue
from glm_training.config.sections.resolved import split_group
from glm_training.utils.words import counted

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def method_issues(config: Config) -> list[Issue]:
    """Everything about `reward.grpo` and `rollout` that does not go together or would do nothing."""
    return [*_sde(config), *_dit_method(config), *_ineffective(config)]


def _sde(config: Config) -> Iterator[Issue]:
    rollout = config.rollout
    if "dit" in config.parts() and config.reward.grpo.dit.method == "flow_grpo" and rollout.sde_kernel == "ode":
        yield Issue(
            ("rollout.sde_kernel", "reward.grpo.dit.method"),
            "`flow_grpo` needs noisy denoising steps, and `ode` has none.",
            "Use `flow`, `dance` or `cps`, or `reward.grpo.dit.method: nft`.",
        )
    if rollout.sde_kernel != "ode" and config.reward.grpo.dit.method != "flow_grpo" and "dit" in config.parts():
        yield Issue(
            ("rollout.sde_kernel", "reward.grpo.dit.method"),
            f"`{config.reward.grpo.dit.method}` samples along the ODE and would not use the noise of "
            f"`{rollout.sde_kernel}`.",
            "Remove it, or use `reward.grpo.dit.method: flow_grpo`.",
        )
    if rollout.branch and ("dit" not in config.parts() or rollout.sde_kernel == "ode"):
        yield Issue(
            ("rollout.branch", "rollout.sde_kernel", "model.component"),
            "without noisy denoising steps all renders of a plan would be the same picture.",
            "It is for `reward.grpo.dit.method: flow_grpo`.",
        )
    if rollout.sde_kernel == "cps" and rollout.eta > 1:
        yield Issue(("rollout.eta", "rollout.sde_kernel"), "the kernel `cps` takes an eta of at most 1.")
    steps, size = config.rollout_sampling().num_inference_steps, rollout.sde_window_size
    limits = [0, steps] if rollout.sde_window_range is None else rollout.sde_window_range
    faults = list(_sde_range(limits, steps))
    yield from faults
    if faults:
        return
    last = min(limits[1], steps - 1) if rollout.sde_kernel == "cps" else limits[1]  # the last step of cps has no noise
    steps = last - limits[0]
    if steps < 1 and rollout.sde_kernel != "ode":
        yield Issue(
            ("rollout.sde_window_range", "rollout.num_inference_steps", "rollout.sde_kernel"),
            "no denoising step is left to be noisy: the last one of `cps` has no noise.",
            "Take more steps, or another kernel.",
        )
    if size is not None and size > steps:
        yield Issue(
            ("rollout.sde_window_size", "rollout.num_inference_steps", "model.dit.num_inference_steps"),
            f"{size} noisy steps out of {steps} possible ones.",
            "Use fewer, or null for all.",
        )
    if (size is None) != (rollout.sde_window_strategy == "all"):
        yield Issue(
            ("rollout.sde_window_strategy", "rollout.sde_window_size"),
            f"`{rollout.sde_window_strategy}` does not go with `rollout.sde_window_size: {size or 'null'}`.",
            "Use `all` without a window size, `random`, `progressive` or `decay` with one.",
        )


def _sde_range(limits: list[int], steps: int) -> Iterator[Issue]:
    if len(limits) != 2 or not 0 <= limits[0] < limits[1] <= steps:
        yield Issue(
            ("rollout.sde_window_range", "rollout.num_inference_steps", "model.dit.num_inference_steps"),
            f"{limits} is no range of the {steps} denoising steps.",
            f"Give the first step and the one after the last, as [0, {steps}].",
        )


def _dit_method(config: Config) -> Iterator[Issue]:
    """Options of one method under another would silently do nothing."""
    dit = config.reward.grpo.dit
    if "dit" not in config.parts():
        return
    for name, asked in (
        ("ratio", dit.ratio == "guard"),
        ("divergence_threshold", dit.divergence_threshold is not None),
        ("noise_weighting", dit.noise_weighting),
    ):
        if asked and dit.method != "flow_grpo":
            yield Issue(
                (f"reward.grpo.dit.{name}", "reward.grpo.dit.method"),
                f"belongs to the method `flow_grpo`; the method is `{dit.method}`.",
                "Remove it, or set the method.",
            )
    if dit.noise_weighting and dit.ratio == "guard":
        yield Issue(
            ("reward.grpo.dit.noise_weighting", "reward.grpo.dit.ratio"),
            "GRPO-Guard's ratios have one size at all steps already, and its loss a weight of its own.",
            "Remove it, or use `reward.grpo.dit.ratio: plain`.",
        )
    if dit.kl_form == "velocity" and dit.method != "flow_grpo":
        yield Issue(
            ("reward.grpo.dit.kl_form", "reward.grpo.dit.method"),
            f"`{dit.method}` weighs the squared velocity difference as it is.",
            "Remove it.",
        )
    elif dit.kl_form == "velocity" and config.policy_for("dit").kl_coef == 0:
        yield Issue(
            ("reward.grpo.dit.kl_form", "reward.grpo.dit.kl_coef"),
            "it has no weight: `kl_coef` is 0.",
            "Remove it, or set `reward.grpo.dit.kl_coef`.",
        )
    yield from _whole_groups(config)
    if dit.timesteps_per_sample is not None and dit.method == "flow_grpo":
        yield Issue(
            ("reward.grpo.dit.timesteps_per_sample", "reward.grpo.dit.method"),
            "`flow_grpo` trains the noisy denoising steps.",
            "Remove it; `rollout.sde_window_size` says how many those are.",
        )


def _whole_groups(config: Config) -> Iterator[Issue]:
    """DGPO compares the renders of a plan in one pass."""
    if config.reward.grpo.dit.method == "dgpo" and config.reward.grpo.dit.compared_with == "prompt":
        yield Issue(
            ("reward.grpo.dit.compared_with", "reward.grpo.dit.method"),
            "`dgpo` prefers one render of a plan to another.",
            "Remove it, or take another method.",
        )
    rollout, samples = config.rollout, config.reward.grpo.num_samples
    group = split_group(config.model.component, samples, rollout.plans_per_prompt, rollout.renders_per_plan)
    micro = rollout.micro_batch_size
    if config.reward.grpo.dit.method != "dgpo" or group is None or micro is None or micro % group.renders == 0:
        return
    yield Issue(
        ("rollout.micro_batch_size", "reward.grpo.dit.method", "rollout.renders_per_plan"),
        f"`dgpo` compares the {counted(group.renders, 'render')} of a plan in one pass, and passes of "
        f"{counted(micro, 'sample')} would part them.",
        f"Use a multiple of {group.renders}, fewer renders per plan, or another method.",
    )


def _ineffective(config: Config) -> Iterator[Issue]:
    """What was asked for and nothing would read: better said than ignored."""
    grpo, rollout = config.reward.grpo, config.rollout
    ar, dit = grpo.ar, grpo.dit
    trained = config.parts()
    asked = {
        "reward.grpo.dit.huber": (dit.huber is not None, dit.method == "awm", "the method `awm`"),
        "reward.grpo.dit.noisiest_share": (dit.noisiest_share != 1.0, dit.method == "dgpo", "the method `dgpo`"),
        "reward.grpo.dit.dgpo_beta": (dit.dgpo_beta != 100.0, dit.method == "dgpo", "the method `dgpo`"),
        "reward.grpo.dit.nft_beta": (dit.nft_beta != 1.0, dit.method == "nft", "the method `nft`"),
        "reward.grpo.dit.advantage_max": (dit.advantage_max != 5.0, dit.method == "nft", "the method `nft`"),
        "reward.grpo.dit.old_decay": (dit.old_decay != "fast", dit.method == "nft", "the method `nft`"),
        "reward.grpo.ar.cispo_cap": (ar.cispo_cap != 5.0, ar.objective == "cispo", "`objective: cispo`"),
        "reward.grpo.ar.similarity_weighting": (ar.similarity_weighting, "ar" in trained, "a trained AR half"),
        "reward.grpo.ar.entropy_reward": (ar.entropy_reward > 0, "ar" in trained, "a trained AR half"),
        "reward.grpo.reference": (
            grpo.reference == "ema",
            any(config.needs_reference(part) for part in trained),
            "a `kl_coef` above 0",
        ),
        "reward.grpo.reference_decay": (grpo.reference_decay != 0.99, grpo.reference == "ema", "`reference: ema`"),
        "rollout.sde_window_size": (
            rollout.sde_window_size is not None and "dit" in trained,
            dit.method == "flow_grpo",
            "the method `flow_grpo`",
        ),
    }
    if ar.entropy_reward > 0 and config.reward.combine == "gdpo":
        yield Issue(
            ("reward.grpo.ar.entropy_reward", "reward.combine"),
            "`gdpo` normalises each metric apart, and has no place for what is added to their sum.",
            "Remove it, or use `reward.combine: sum`.",
        )
    for key, (given, has_effect, needs) in asked.items():
        if given and not has_effect:
            yield Issue((key,), f"belongs to {needs}, and does nothing here.", "Remove it.")
