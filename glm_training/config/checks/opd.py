"""What on-policy distillation, its teachers and the sampling of its rollouts ask of each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue
from glm_training.config.sections.resolved import split_group

if TYPE_CHECKING:
    from glm_training.config.schema import Config


def opd_issues(config: Config) -> Iterator[Issue]:
    """Everything about the section `opd` and `training.method: opd` that does not go together."""
    if config.training.method != "opd":
        if config.opd.teachers:
            yield Issue(("opd.teachers", "training.method"), "teachers are for `opd`.", "Set `training.method: opd`.")
        return
    if config.model.family != "glm_image":
        yield Issue(
            ("training.method", "model.family"),
            f"`opd` distils GLM-Image, not `{config.model.family}`.",
            "Use `model.family: glm_image`, or another method.",
        )
        return
    yield from _teachers(config)
    yield from _sampling(config)
    for part in config.parts():
        lora = config.lora_for(part)
        if lora.enabled and lora.dropout > 0:
            yield Issue(
                ("lora.dropout", f"lora.{part}.dropout", "training.method"),
                f"{lora.dropout:g} would make {part} differ from its teacher by chance.",
                "Set it to 0.",
            )


def _teachers(config: Config) -> Iterator[Issue]:
    if not config.opd.teachers:
        yield Issue(
            ("opd.teachers", "training.method"),
            "`opd` learns from teachers, and there is none.",
            "Give each as `opd.teachers.<name>`, with `prompts_file` and `adapters` or `model`.",
        )
    for name, teacher in config.opd.teachers.items():
        key = f"opd.teachers.{name}"
        if re.fullmatch(r"[\w-]+", name) is None:
            yield Issue((key,), "a name has letters, digits, `_` and `-` only.")
        if (teacher.adapters is None) == (teacher.model is None):
            given = "neither is given" if teacher.model is None else "both are given"
            yield Issue((key,), f"a teacher has `adapters` or is a `model`, and {given}.", "Give one of the two.")
        elif teacher.adapters is not None and config.model.adapters:
            yield Issue(
                (f"{key}.adapters", "model.adapters"),
                "belong on the model without the adapters that are merged into the student.",
                "Export the teacher as a whole and name it as `model`, or remove `model.adapters`.",
            )


def _sampling(config: Config) -> Iterator[Issue]:
    rollout = config.rollout
    if "dit" in config.parts() and rollout.sde_kernel == "ode":
        yield Issue(
            ("rollout.sde_kernel", "training.method"),
            "`opd` compares noisy denoising steps, and `ode` has none.",
            "Use `flow`, `dance` or `cps`.",
        )
    if "ar" in config.parts() and not config.model.ar.do_sample:
        yield Issue(
            ("model.ar.do_sample", "training.method"),
            "the KL is that of the distribution that draws, and nothing is drawn.",
            "Set it to true.",
        )
    samples = config.reward.grpo.num_samples
    if split_group(config.model.component, samples, rollout.plans_per_prompt, rollout.renders_per_plan) is None:
        yield Issue(
            ("reward.grpo.num_samples", "rollout.plans_per_prompt", "rollout.renders_per_plan"),
            f"num_samples {samples} does not split as `rollout` says.",
            "num_samples = plans_per_prompt x renders_per_plan must hold; without any of them both are 1.",
        )
