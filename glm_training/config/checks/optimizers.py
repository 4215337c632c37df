"""What update rules and schedules ask of the rest of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from glm_training.config.errors import Issue
from glm_training.config.sections.base import Part
from glm_training.config.sections.optimization import OptimizerName
from glm_training.config.sections.resolved import ResolvedOptimizer

if TYPE_CHECKING:
    from glm_training.config.schema import Config

SMALLEST_PRODIGY_RATE = 0.01
"""Of `prodigy`, whose learning rate multiplies the steps that it finds: below, it was meant for another rule."""


UNREAD_BY: dict[OptimizerName, tuple[str, ...]] = {
    "adafactor": ("beta1", "beta2", "epsilon"),
    "lion": ("epsilon",),
    "sgd": ("beta2", "epsilon"),
}
"""Keys of `optimizer.<part>` that an update rule has no use for; others use all."""


def optimizer_issues(config: Config) -> Iterator[Issue]:
    """Everything about `training.optimizer`, `optimizer.<part>` and `training.ema` that does not go together."""
    told = set[tuple[str, ...]]()
    for part in config.parts():
        for issue in _of_part(config, part, config.optimizer_for(part)):
            if issue.paths not in told:  # what both halves have of `training` is said once
                told.add(issue.paths)
                yield issue
    yield from _ineffective(config)
    yield from _unread(config)


def _of_part(config: Config, part: Part, settings: ResolvedOptimizer) -> Iterator[Issue]:
    name = _key(config, part, "name", "optimizer")
    if settings.name == "adamw_schedule_free":
        if settings.scheduler != "constant":
            yield Issue(
                (_key(config, part, "scheduler", "lr_scheduler"), name),
                f"schedule-free averages the weights in place of a schedule, and this one is `{settings.scheduler}`.",
                "Use `constant`; the warmup stays.",
            )
        if settings.beta1 == 0:
            yield Issue(
                (_key(config, part, "beta1", "adam_beta1"), name),
                "schedule-free takes gradients between its newest weights and their average: beta1 is where, above 0.",
                "0.9 is usual.",
            )
        if config.training.ema.decay is not None:
            yield Issue(
                ("training.ema.decay", name), "schedule-free keeps an average of its own.", "Use one of the two."
            )
    if settings.name == "prodigy":
        if settings.learning_rate < SMALLEST_PRODIGY_RATE:
            own_rate = f"training.{part}_learning_rate" if _part_rate(config, part) is not None else ""
            yield Issue(
                (_key(config, part, "learning_rate", "learning_rate") if not own_rate else own_rate, name),
                f"Prodigy finds the size of its steps, and {settings.learning_rate:g} of it is next to nothing.",
                "Remove it, or give a share near 1.",
            )
        for key, rate in _rates_beside(config).items():
            if rate is not None and rate < SMALLEST_PRODIGY_RATE:
                yield Issue((key, name), f"Prodigy finds the size of its steps; {rate:g} of it is next to nothing.")
        if part == "autoencoder" and config.vgt.encoder_rate_ratio != 1:
            yield Issue(
                ("vgt.encoder_rate_ratio", name), "Prodigy has one learning rate for all weights.", "Set it to 1."
            )


def _rates_beside(config: Config) -> dict[str, float | None]:
    """Of the networks that are trained beside the model, with its update rule."""
    if config.training.method == "dmdr":
        return {"dmdr.guidance_learning_rate": config.dmdr.guidance_learning_rate}
    return {"vgt.gan.learning_rate": config.vgt.gan.learning_rate} if config.model.family == "vgt" else {}


def _part_rate(config: Config, part: Part) -> float | None:
    own = getattr(config.optimizer, part).learning_rate
    return getattr(config.training, f"{part}_learning_rate") if part in ("ar", "dit") and own is None else None


def _key(config: Config, part: Part, own: str, shared: str) -> str:
    """The key that decides: the part's own where it is given, else the shared one."""
    return f"training.{shared}" if getattr(getattr(config.optimizer, part), own) is None else f"optimizer.{part}.{own}"


def _unread(config: Config) -> Iterator[Issue]:
    """What was asked for and no update rule reads. A key of `training` counts for the parts without one of their own;
    what has its default may be meant for another rule, or stand in the file that a run has written."""
    parts = config.parts()
    for own, shared in (("beta1", "adam_beta1"), ("beta2", "adam_beta2"), ("epsilon", "adam_epsilon")):
        given = getattr(config.training, shared) != type(config.training).model_fields[shared].default
        heirs = [part for part in parts if getattr(getattr(config.optimizer, part), own) is None]
        if given and heirs and all(own in UNREAD_BY.get(config.optimizer_for(part).name, ()) for part in heirs):
            hint = f"Remove it, or set it to {type(config.training).model_fields[shared].default:g}."
            yield _unread_issue(config, heirs[0], f"training.{shared}", hint)
        for part in parts:
            if part not in heirs and own in UNREAD_BY.get(config.optimizer_for(part).name, ()):
                yield _unread_issue(config, part, f"optimizer.{part}.{own}", "Remove it.")
    yield from _unread_moments(config)
    if config.optimizer.decay_norms_and_biases and not any(config.optimizer_for(part).weight_decay for part in parts):
        decay = _key(config, parts[0], "weight_decay", "weight_decay")
        yield Issue(("optimizer.decay_norms_and_biases", decay), "nothing decays: weight decay is 0.", "Remove it.")


def _unread_moments(config: Config) -> Iterator[Issue]:
    """`moments_dtype` without an `adamw` that would read it; float32 is what all others keep."""
    narrow = [part for part in config.parts() if config.optimizer_for(part).moments_dtype == "bfloat16"]
    heirs = [part for part in narrow if getattr(config.optimizer, part).moments_dtype is None]
    others = [part for part in narrow if config.optimizer_for(part).name != "adamw"]
    hint = "Its moments are its library's: remove it."
    if heirs and all(part in others for part in heirs):
        yield _unread_issue(config, heirs[0], "optimizer.moments_dtype", hint)
    for part in others:
        if part not in heirs:
            yield _unread_issue(config, part, f"optimizer.{part}.moments_dtype", hint)


def _unread_issue(config: Config, part: Part, key: str, hint: str) -> Issue:
    name = config.optimizer_for(part).name
    return Issue((key, _key(config, part, "name", "optimizer")), f"`{name}` has no use for it.", hint)


def _ineffective(config: Config) -> Iterator[Issue]:
    """What was asked for and no schedule, or no average, would read: better said than ignored."""
    schedules = {config.optimizer_for(part).scheduler for part in config.parts()}
    ema = config.training.ema
    asked = {
        "training.lr_cycles": (config.training.lr_cycles != 2, "cosine_with_restarts" in schedules),
        "training.lr_power": (config.training.lr_power != 1.0, "polynomial" in schedules),
    }
    for part in config.parts():
        own, scheduler = getattr(config.optimizer, part), config.optimizer_for(part).scheduler
        asked[f"optimizer.{part}.cycles"] = (own.cycles is not None, scheduler == "cosine_with_restarts")
        asked[f"optimizer.{part}.power"] = (own.power is not None, scheduler == "polynomial")
        if own.min_lr_ratio is not None and scheduler == "constant":
            yield Issue(
                (f"optimizer.{part}.min_lr_ratio", _key(config, part, "scheduler", "lr_scheduler")),
                "`constant` stays at the learning rate to the last step.",
                "Remove it, or take another schedule.",
            )
    for key, (given, has_effect) in asked.items():
        if given and not has_effect:
            needs = "cosine_with_restarts" if key.endswith("cycles") else "polynomial"
            yield Issue((key, "training.lr_scheduler"), f"belongs to `{needs}`, and does nothing here.", "Remove it.")
    for key in ("evaluate", "export"):
        if ema.decay is None and not getattr(ema, key):
            yield Issue((f"training.ema.{key}", "training.ema.decay"), "there is no average.", "Remove it.")
