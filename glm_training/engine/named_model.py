"""What a command means by `--model` and `--lora`: a run, a checkpoint, a pipeline folder, a hub id, "tiny".

Of a run it is the best checkpoint where one is named, or else the last whole one. A checkpoint has a pipeline, or
(`checkpoint.save_lora_only`) adapters alone: then the model is the one that they were trained on, with them merged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from glm_training.checkpoint.best import BEST, read_best
from glm_training.checkpoint.commit import PARTIAL, POINTER
from glm_training.checkpoint.ledger import LEDGER, Ledger
from glm_training.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify_checkpoint
from glm_training.checkpoint.resume import own_checkpoints
from glm_training.checkpoint.run_record import RECORD
from glm_training.checkpoint.state_tree import CheckpointError
from glm_training.config import Config, ConfigError
from glm_training.config.checks.family import COMPONENTS
from glm_training.config.loading.load import config_from_yaml
from glm_training.engine.families import FAMILIES, adapters_to_merge
from glm_training.models.adapters import (
    StartingAdapter,
    malformed,
    merge_into,
    misfit,
    starting_adapters,
    weights_file,
)
from glm_training.models.family import Family, FewSteps
from glm_training.models.loading import ModelLoadError
from glm_training.models.run_folders import (
    INDEX,
    PIPELINE,
    checkpoint_places,
    is_adapter,
    pipeline_in,
)
from glm_training.utils.downloads import sha256_of
from glm_training.utils.writable import expanded, nearest_place

_LIKE_A_NUMBER = re.compile(r"[+-]?(nan|inf(inity)?|\d[\d.,e+-]*|[.,]\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class NamedModel:
    """What a name means.

    source: what a family's loader takes: a pipeline folder, a hub id or "tiny", at `revision`. family: which it is of,
    where the checkpoint of adapters says so; None where the source does. adapters: to be merged into it. few_steps: how
    it is drawn from where `source` does not know. checkpoint: the one that was taken. note: a line on which one of a
    run that is, and why; None where nothing was chosen.
    """

    source: str
    revision: str | None = None
    family: str | None = None
    adapters: tuple[StartingAdapter, ...] = ()
    few_steps: FewSteps | None = None
    checkpoint: Path | None = None
    note: str | None = None

    def load(
        self,
        family: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        adapters: Sequence[StartingAdapter] = (),
    ) -> Family:
        """The model of a `family`, its own adapters and then further ones merged into the weights: W + sum of
        strength_i alpha_i / r_i B_i A_i, in fp32, rounded once. Raises ModelLoadError."""
        loaded: Family = FAMILIES[family].load(self.source, dtype=dtype, device=device, revision=self.revision)
        merge_into(loaded, [*self.adapters, *adapters])
        if self.few_steps is not None:
            loaded.draw_in_few_steps(self.few_steps)
        return loaded.eval()


def named_model(name: str, key: str = "--model") -> NamedModel:
    """What `name`, given as `key`, means; what is no local folder is for its loader to judge.

    Raises ModelLoadError for a run or a checkpoint that has nothing whole, for a part of a pipeline, and for what is
    not there where runs are: it is no hub id, though it may look like one.
    """
    if name in ("tiny", "tiny-random"):
        return NamedModel(name)
    place = expanded(name)
    if not place.exists() and next(place.parent.glob(f"*/{RECORD}"), None) is not None:
        near = nearest_place(name)
        meant = "" if near is None else f"; did you mean {near}?"
        raise ModelLoadError(f"{key} {name}: among the runs in {place.parent} there is none of that name{meant}")
    checkpoint, rest, note = named_checkpoint(name, key)
    if checkpoint is None:
        return NamedModel(pipeline_in(name, key))
    if rest or (checkpoint / PIPELINE / INDEX).is_file():
        return NamedModel(pipeline_in(checkpoint / rest, key), checkpoint=checkpoint, note=note)
    return _adapted(checkpoint, note, key)


def named_adapters(
    entries: Sequence[str], model: NamedModel, family: str, key: str = "--lora"
) -> tuple[list[StartingAdapter], list[str]]:
    """The adapters that `entries` of the form [PART=]PLACE[:STRENGTH] mean for a `model` of a `family`, and a line for
    each that was chosen of a run.

    PLACE is the folder of an adapter, a checkpoint, a step of `checkpoint.lora_dir` or a run. Without PART they are all
    that lie there of the parts of the model. Raises ModelLoadError, with all that is wrong, before any weight of the
    model is read where it is on this machine.
    """
    found, notes, problems = list[StartingAdapter](), list[str](), list[str]()
    for entry in entries:
        try:
            adapters, note = _named_adapters(entry, family, key)
        except ModelLoadError as error:
            problems.append(str(error))
            continue
        found += adapters
        notes += [] if note is None else [note]
    for each in [*model.adapters, *found]:
        if reason := _unfit(each, model, family):
            problems.append(reason)
    if problems:
        raise ModelLoadError("\n".join(problems))
    return found, notes


def _named_adapters(entry: str, family: str, key: str) -> tuple[list[StartingAdapter], str | None]:
    parts = [part for part in COMPONENTS[family] if part != "both"]
    place, strength = _strength(entry, key)
    part, _, rest = place.partition("=")
    if any(part in every for every in COMPONENTS.values()) and rest:
        if part not in parts:
            raise ModelLoadError(f"{key} {entry}: this model has no {part}: write {_ways(parts)}")
        place = rest
    else:
        part = ""
    checkpoint, inside, note = named_checkpoint(place, key)
    folder = expanded(place) if checkpoint is None else checkpoint / inside
    if folder.is_file() and is_adapter(folder.parent):
        own = weights_file(folder.parent).name
        if folder.name not in (own, "adapter_config.json"):
            raise ModelLoadError(
                f"{key} {entry}: of {folder.parent} {own} would be read, not {folder.name}: name a folder "
                "that holds it under that name alone"
            )
        folder = folder.parent
    if not part and len(parts) > 1 and is_adapter(folder) and folder.name.removeprefix("lora_") not in parts:
        raise ModelLoadError(f"{key} {entry}: say which half it is of: write {_ways(parts)}")
    adapters = starting_adapters(key, [str(folder)], [part] if part else parts)
    return [replace(each, strength=strength) for each in adapters], note


def _ways(parts: Sequence[str]) -> str:
    return " or ".join(f"{part}=FOLDER" for part in parts)


def _strength(entry: str, key: str) -> tuple[str, float]:
    """Place and strength of `entry`; a place that has a colon and a number at its end, and is there, is one. Raises
    ModelLoadError where what follows the colon is meant for a strength and is none."""
    place, colon, number = entry.rpartition(":")
    if not (colon and place) or _is_there(entry):
        return entry, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if math.isfinite(strength):
        return place, strength
    if _is_there(place) or _LIKE_A_NUMBER.fullmatch(number):
        raise ModelLoadError(f"{key} {entry}: the strength {number!r} is no finite number: write it as {place}:0.5")
    return entry, 1.0


def _is_there(place: str) -> bool:
    """Of the form [PART=]PLACE."""
    return any(expanded(each).exists() for each in (place, place.partition("=")[2]) if each)


def _unfit(adapter: StartingAdapter, model: NamedModel, family: str) -> str | None:
    """Why an adapter does not go on the model; None where it does, and where the model is not here to tell."""
    if reason := malformed(adapter):
        return reason
    skeleton = FAMILIES[family].skeleton
    module = None if skeleton is None else skeleton(model.source, adapter.part, model.revision)
    return None if module is None else misfit(adapter, module)


def named_checkpoint(name: str | Path, key: str) -> tuple[Path | None, str, str | None]:
    """The checkpoint that `name` means, what of it is named inside it ("" for all), and a line on which of a run it is;
    None where it has nothing to do with a run. Raises ModelLoadError where a run has none that is whole."""
    path = expanded(name)
    for place in (path, *path.parents):
        if place.name in (POINTER, BEST) and not place.is_dir() and _holds_checkpoints(place.parent):
            found = _pointed(place, key)
            inside = path.relative_to(place).as_posix()
            return found, "" if inside == "." else inside, f"{key} {name} is {found}"
    if not path.is_dir() or (path / INDEX).is_file():
        return None, "", None
    if (path / MANIFEST).is_file():
        return path, "", None
    folder = next((place for place in checkpoint_places(path) if _holds_checkpoints(place)), None)
    if folder is not None:
        found, why = _best_or_last(folder)
        return found, "", f"{key} {name} is {found}, {why}"
    for place in checkpoint_places(path):
        if lost := _lost(place):
            raise ModelLoadError(f"{key} {name} is a run whose checkpoints are gone: it saved {lost} in {place} last")
    if (path / RECORD).is_file():
        raise ModelLoadError(f"{key} {name} is a run that has saved no checkpoint yet")
    return None, "", None


def _lost(folder: Path) -> str | None:
    """The newest checkpoint that a run made in `folder`, where none is; one that it was about to make is none."""
    made = Ledger.read(folder).names() if (folder / LEDGER).is_file() else []
    return next((name for name in reversed(made) if not (folder / f"{PARTIAL}{name}").exists()), None)


def _holds_checkpoints(folder: Path) -> bool:
    return folder.is_dir() and any((step / MANIFEST).is_file() for step in folder.glob("step-*"))


def _pointed(pointer: Path, key: str) -> Path:
    """The checkpoint that a pointer names."""
    if pointer.name == BEST:
        best = read_best(pointer.parent)
        name = None if best is None else best.name
    else:
        name = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if name is None:
        raise ModelLoadError(f"{key}: {pointer.parent} names no {pointer.name} checkpoint; name one of it yourself")
    if not (pointer.parent / name / MANIFEST).is_file():
        raise ModelLoadError(f"{key}: {pointer} names {name}, which is not there; name another one yourself")
    return pointer.parent / name


def _best_or_last(checkpoints_dir: Path) -> tuple[Path, str]:
    """The checkpoint that a run is taken for, and why that one."""
    own, best, passed = own_checkpoints(checkpoints_dir), read_best(checkpoints_dir), list[str]()
    first = [path for path in own if best is not None and path.name == best.name]
    for path in dict.fromkeys([*first, *own]):
        try:
            _verify_weights(path)
        except CheckpointError as error:
            passed.append(f"passed over: {error}")
            continue
        if best is not None and path in first:
            why = f"its best: {best.told()}"
        elif best is not None and not first:
            why = f"its last whole one, as {best.name}, which is named its best, is not among its own"
        else:
            why = "its last whole one" if first else "its last whole one, as none is named its best"
        return path, "; ".join([why, *passed])
    raise ModelLoadError("\n".join([f"no checkpoint in {checkpoints_dir} is whole", *passed]))


def _verify_weights(checkpoint: Path) -> None:
    """Compares what a model is loaded from with the manifest. Raises CheckpointError."""
    folders = {name.partition("/")[0] for name in read_manifest(checkpoint).files}
    wanted = {PIPELINE} if PIPELINE in folders else {name for name in folders if name.startswith("lora_")}
    for folder in sorted(wanted):
        verify_checkpoint(checkpoint, below=folder)


def _adapted(checkpoint: Path, note: str | None, key: str) -> NamedModel:
    """The model that the adapters of a checkpoint belong on, with them."""
    try:
        manifest = read_manifest(checkpoint)
        config = config_from_yaml(manifest.metadata["config"])
    except (CheckpointError, ConfigError, KeyError) as error:
        raise ModelLoadError(
            f"{key}: {checkpoint} has adapters alone, and does not tell which model they belong on ({error}): name "
            "that model, and give them as --lora"
        ) from error
    model = config.model
    parts = [part for part in COMPONENTS[model.family] if part != "both"]
    own = starting_adapters(key, [str(checkpoint)], parts)
    base = model.name
    if model.quantization != "none":
        base += f" in full; they were trained over it in {model.quantization}, with which the run drew"
    dmdr = config.dmdr if config.training.method == "dmdr" else None
    return NamedModel(
        pipeline_in(model.name),
        model.revision,
        model.family,
        (*_merged_before(config, manifest, key), *own),
        None if dmdr is None else FewSteps(dmdr.student_steps, dmdr.one_step_timestep),
        checkpoint,
        f"{checkpoint if note is None else f'{note}; it'} has adapters alone, which go on {base}",
    )


def _merged_before(config: Config, manifest: Manifest, key: str) -> list[StartingAdapter]:
    """The adapters of `model.adapters` that the training had merged. Raises ModelLoadError where they are others."""
    found, digests = adapters_to_merge(config), manifest.metadata.get("data", {})
    for each in found:
        if digests.get(f"{each.key} {each.folder}") != sha256_of(each.file):
            raise ModelLoadError(
                f"{key}: the training merged {each.folder} into {config.model.name} (model.adapters) first, which is "
                "another adapter by now: name that model, and give the adapters as --lora"
            )
    return found
