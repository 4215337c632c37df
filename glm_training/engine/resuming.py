"""Which checkpoint a run resumes from, and whether that belongs to it: the configuration and the data it was made
under."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_training.checkpoint.commit import STATES
from glm_training.checkpoint.manifest import MANIFEST, digest_file, verify_checkpoint
from glm_training.checkpoint.resume import ResumePoint
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.config import Config, ConfigError, config_diff, leaves, resolved_yaml
from glm_training.config.loading.load import config_from_yaml
from glm_training.config.sections.base import Part
from glm_training.data import describe_drift
from glm_training.engine.agreement import MODELS, contents_digest, refuse, together
from glm_training.engine.errors import SettingsError
from glm_training.models.run_folders import IN_PACKAGE, PIPELINE
from glm_training.utils.distributed import World, broadcast_object, gather_objects
from glm_training.utils.words import counted
from glm_training.utils.writable import expanded

LENGTH = ["training.max_steps", "training.num_epochs"]
"""A run may be made longer when it is resumed; a schedule that ends with the run then ends later."""


WEIGHTS = "weights of "
"""Before the key of a folder or file of weights, among the digests of the data."""

_READ = (*(f"*.{ending}" for ending in ("safetensors", "bin", "pth", "json", "txt")), "*.model")


def weights_digests(config: Config) -> dict[str, str]:
    """Digests of what is in the local folders and files that the frozen weights come from, by `WEIGHTS` and key: a
    checkpoint holds what is trained, and adapters on other weights are another model."""
    named = {key: value for key, value in leaves(config) if key in MODELS and value is not None}
    named |= {f"opd.teachers.{name}.model": each.model for name, each in config.opd.teachers.items() if each.model}
    found = {}
    for key, value in named.items():
        place = expanded(value)
        place = place / PIPELINE if (place / PIPELINE).is_dir() else place
        if value not in IN_PACKAGE and place.exists():
            told = " ".join(contents_digest(place, pattern) for pattern in _READ)
            found[f"{WEIGHTS}{key}"] = hashlib.sha256(told.encode()).hexdigest()
    return found


def save_context(config: Config, digests: dict[str, str]) -> dict[str, Any]:
    """What a checkpoint remembers of the run, for `check_drift`."""
    return {"config": resolved_yaml(config), "data": digests}


def agreed_resume(
    config: Config, world: World, digests: dict[str, str], choose: Callable[[], ResumePoint | None]
) -> ResumePoint | None:
    """The checkpoint that all processes resume from; None for a new run. A collective.

    Rank 0 picks and verifies it, by `choose`; the others must find that very one, by the digest of its manifest, and
    whole as far as they read it. `digests`: of the training data. Raises SettingsError where there is none, or it is
    not of this run; DistributedError, on every process, where one cannot load it.
    """
    point, problem = together(world, "choosing the checkpoint", lambda: _choose(config, world, digests, choose))
    problem = broadcast_object(world, problem)
    if problem is not None:
        raise SettingsError(problem)
    chosen = broadcast_object(world, None if point is None else _identity(point.path))
    if chosen is None:
        return None
    reason = None
    if point is None:
        point, reason = _same(Path(chosen[0]), chosen[1])
    lines = [
        f"rank {rank} cannot load the checkpoint that rank 0 resumes from: {text}"
        for rank, text in enumerate(gather_objects(world, reason))
        if text is not None
    ]
    refuse(world, lines, "The folder of checkpoints must be one for all: on a shared disk that shows what was written.")
    return point


def _choose(
    config: Config, world: World, digests: dict[str, str], choose: Callable[[], ResumePoint | None]
) -> tuple[ResumePoint | None, str | None]:
    """On rank 0 the checkpoint, if the run resumes, or why it cannot."""
    if not world.is_main:
        return None, None
    try:
        point = choose()
        if point is None:
            return None, None
        _require_optimizers(point)
        check_drift(point, config, digests)
    except (CheckpointError, SettingsError) as error:
        return None, str(error)
    return point, None


def _identity(path: Path) -> tuple[str, str]:
    return os.path.abspath(path), digest_file(path / MANIFEST).sha256


def _same(path: Path, manifest_sha256: str) -> tuple[ResumePoint | None, str | None]:
    """The checkpoint at `path` as this process sees it, and what is wrong with it if it is not that of rank 0."""
    try:
        found = digest_file(path / MANIFEST).sha256
        if found != manifest_sha256:
            return None, f"{path} is another one here ({MANIFEST} {found[:12]}, on rank 0 {manifest_sha256[:12]})"
        return ResumePoint(path, verify_checkpoint(path, below=STATES)), None
    except OSError as error:
        return None, f"{path / MANIFEST} cannot be read here ({error.strerror})"
    except CheckpointError as error:
        return None, str(error)


def _anew(point: ResumePoint) -> str:
    """How another run starts from what the checkpoint holds of the model: adapters alone, or a pipeline as well."""
    ways = []
    if any(point.path.glob("lora_*")):
        ways += ["lora.start_from set to it, which trains its adapters on", "model.adapters, which merges them"]
    if (point.path / PIPELINE).is_dir():
        ways.append("model.name set to it")
    return f"start a new run with {', or '.join(ways)}" if ways else "start a new run"


def _require_optimizers(point: ResumePoint) -> None:
    if not any(name.endswith("_optimizer") for name in point.manifest.states):
        raise SettingsError(
            f"{point.path} was saved with checkpoint.save_optimizer: false and cannot be resumed; {_anew(point)}"
        )


def check_drift(point: ResumePoint, config: Config, digests: dict[str, str]) -> None:
    """Raises SettingsError with a diff when configuration or data changed; `resume.accept` lists what may.

    Other trained weights and another optimizer are refused whatever is accepted: what one remembers means nothing to
    the other.
    """
    context = point.manifest.metadata
    try:
        before = config_from_yaml(context["config"])
    except ConfigError as error:
        raise SettingsError(
            f"{point.path} was made by a version of glm_training that had other keys: resume it with that version, or "
            f"{_anew(point)}\n{error}"
        ) from error
    accepted = [*LENGTH, *config.resume.accept]
    _require_same_weights(point, before, config)
    _require_same_optimizers(point, before, config)
    lines = config_diff(before, config, accepted)
    if "data" not in config.resume.accept:
        known = context["data"]  # of weights, checkpoints of earlier versions have no digests
        lines += describe_drift(known, {k: v for k, v in digests.items() if k in known or not k.startswith(WEIGHTS)})
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise SettingsError(
            f"{point.path} was made under other settings or data:\n{listed}\n"
            "put them back, or list the keys under resume.accept (data: images, prompts, and what is in "
            "folders of weights)"
        )


def moved_schedules(config: Config, before: int, now: int) -> list[str]:
    """What is told of a run of `before` steps that is made `now` steps long: the schedules that end with the run."""
    moved = [
        f"the learning rate of {part} ({config.optimizer_for(part).scheduler})"
        for part in config.parts()
        if config.optimizer_for(part).scheduler != "constant"
    ]
    dmdr = config.dmdr
    dynamic = dmdr.dynamic_guidance or dmdr.dynamic_renoise
    keep = ""
    if config.training.method == "dmdr" and dynamic and dmdr.dynamic_steps is None and dmdr.cold_start_steps is None:
        moved.append("DynaDG and DynaRS")
        keep = f" dmdr.dynamic_steps={before} resume.accept='[dmdr.dynamic_steps]' keeps the latter as they were."
    if before == now or not moved:
        return []
    return [
        f"the run was to have {counted(before, 'step')} and now has {now}. Schedules that end with the run are from "
        f"here on those of one of {now}: {', '.join(moved)}.{keep}"
    ]


def _require_same_weights(point: ResumePoint, before: Config, now: Config) -> None:
    changed = []
    for part in dict.fromkeys((*before.parts(), *now.parts())):
        was, will = _trained(before, part), _trained(now, part)
        if was != will:
            changed.append(f"  of the {part} half {was} were trained, and this run trains {will}")
    what, remedy = "other trained weights", "put model.component and lora back; resume.accept cannot allow it."
    _refuse_changed(point, what, changed, f"{remedy} To go on from what was learnt,")


def _trained(config: Config, part: Part) -> str:
    if part not in config.parts():
        return "no weights"
    lora = config.lora_for(part)
    return f"adapters of rank {lora.rank}" if lora.enabled else "all weights"


def _rule(config: Config, part: Part) -> str:
    settings = config.optimizer_for(part)
    narrow = settings.moments_dtype != "float32"
    return settings.name + (f" with moments in {settings.moments_dtype}" if narrow else "")


def _require_same_optimizers(point: ResumePoint, before: Config, now: Config) -> None:
    changed = []
    for part in now.parts():
        saved, wanted = _rule(before, part), _rule(now, part)
        if saved != wanted:
            changed.append(f"  the {part} half was trained with {saved}, and this run asks for {wanted}")
    remedy = (
        "put training.optimizer (or optimizer.<half>) back; resume.accept cannot allow it, as what one "
        "remembers means nothing to the other."
    )
    _refuse_changed(point, "another optimizer", changed, f"{remedy} To go on with new moments,")


def _refuse_changed(point: ResumePoint, what: str, changed: list[str], remedy: str) -> None:
    if changed:
        listed = "\n".join(changed)
        raise SettingsError(f"{point.path} cannot be continued with {what}:\n{listed}\n{remedy} {_anew(point)}")
