"""What a folder of a run means where a model, an adapter or weights are asked for.

A checkpoint, `checkpoints/step-000100`, holds `pipeline/` and `lora_<part>/`: it is taken for the one that is meant. A
run has several checkpoints, and which is its newest changes, so of its folder the newest is named and not taken: a run
that resumes must start from the same weights as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from glm_training.models.loading import ModelLoadError
from glm_training.utils.writable import expanded

PIPELINE, INDEX = "pipeline", "model_index.json"
IN_PACKAGE = ("tiny", "tiny-random", "full-width")
"""Models that need no folder; one of that name is none of them."""
POINTER, BEST = "latest", "best"
"""Files among a run's checkpoints that name one, in their first line."""
ADAPTER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")
_WEIGHTS = ("*.safetensors", "*.bin")


def pipeline_in(name: str | Path, key: str = "model.name") -> str:
    """The pipeline folder that `name` means: itself, or the one in a checkpoint. What is no local folder, or has
    nothing to do with a run, stays as it is for its loader to judge.

    Raises ModelLoadError, naming the folder to give under `key`, for the folder of a run, its pointers `latest` and
    `best`, adapters alone, or a part of a pipeline. What a command may name besides is known to `engine.named_model`.
    """
    folder = _pointed_at(expanded(name))
    if folder != expanded(name):
        raise ModelLoadError(f"{key} {name} is another checkpoint after each save: name {folder}, which it is now")
    if str(name) in IN_PACKAGE or not folder.is_dir():
        return str(name)
    if (folder / INDEX).is_file():
        return str(folder)
    if (folder / PIPELINE / INDEX).is_file():
        return str(folder / PIPELINE)
    if (folder.parent / INDEX).is_file():
        raise ModelLoadError(f"{key} {name} is one part of a pipeline: name {folder.parent}")
    newest = newest_checkpoint(folder)
    if newest is not None:
        raise ModelLoadError(
            f"{key} {name} is the folder of a run: name one of its checkpoints, the newest is {newest}"
        )
    adapters = _adapters(_newest(folder, _adapters) or folder)
    if adapters:
        listed = " ".join(f"--lora {path.name.removeprefix('lora_')}={path}" for path in adapters)
        raise ModelLoadError(
            f"{key} {name} has adapters alone (checkpoint.save_lora_only): name the model that they were trained on. "
            f"glm-train sample puts them on it with {listed}"
        )
    return str(name)


def _pointed_at(path: Path) -> Path:
    """`path` with the pointer file `latest` or `best` on its way, if there is one, followed."""
    for pointer in (path, *path.parents):
        if pointer.name in (POINTER, BEST) and pointer.is_file():
            name = pointer.read_text(errors="replace").partition("\n")[0].strip()
            return pointer.parent / name / path.relative_to(pointer)
    return path


def adapters_in(place: str | Path, parts: Sequence[str], key: str) -> dict[str, Path]:
    """The folders of the adapters that `place` means, by the part of the model: those in a checkpoint or in a step of
    `checkpoint.lora_dir`, or in the newest of a run; or `place` itself, of the part that its name ends with.

    Raises ModelLoadError, naming what to give under `key`, where there is none.
    """
    folder = _pointed_at(expanded(place))
    if is_adapter(folder) and not _by_part(folder, parts):  # an export has files for other programs beside its folders
        part = parts[0] if len(parts) == 1 else folder.name.removeprefix("lora_")
        if part in parts:
            return {part: folder}
        raise ModelLoadError(f"{key}: call the folder {place} {' or '.join(f'lora_{part}' for part in parts)}")
    for found in (folder, _newest(folder, lambda step: _by_part(step, parts))):
        if found is not None and (adapters := _by_part(found, parts)):
            return adapters
    strangers = sorted(path.name for path in _adapters(_newest(folder, _adapters) or folder))
    if strangers:
        wanted = " or ".join(f"lora_{part}" for part in parts)
        raise ModelLoadError(
            f"{key}: {place} has adapters of other parts, {', '.join(strangers)}: name one with {wanted}"
        )
    if (folder / INDEX).is_file() or (folder / PIPELINE / INDEX).is_file() or newest_checkpoint(folder):
        newest = newest_checkpoint(folder) or folder
        raise ModelLoadError(f"{key}: {place} has a whole model and no adapters: set model.name to {newest}")
    wanted = " or ".join(f"lora_{part}" for part in parts)
    raise ModelLoadError(f"{key}: there are no adapters in {place}: name a checkpoint, or a run, with {wanted} in it")


def _by_part(folder: Path, parts: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for part in parts:
        for place in (folder / f"lora_{part}", folder / part):
            if is_adapter(place):
                found.setdefault(part, place)
    return found


def weights_below(folder: Path) -> list[Path]:
    """Files of whole weights of a diffusion network in a folder that was given where a file is asked for."""
    newest = _newest(folder, lambda step: (step / PIPELINE).is_dir())
    places = [folder, *(root / part for root in (folder, folder / PIPELINE) for part in ("unet", "transformer"))]
    places += [newest / PIPELINE / part for part in ("unet", "transformer")] if newest is not None else []
    return [file for place in places for pattern in _WEIGHTS for file in sorted(place.glob(pattern))]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with a pipeline in the folder of a run, or in its `checkpoints`."""
    return _newest(folder, lambda step: (step / PIPELINE / INDEX).is_file())


def _newest(folder: Path, fits: Callable[[Path], object]) -> Path | None:
    """The last made of the checkpoints in or below the folder of a run that `fits`."""
    for place in checkpoint_places(folder):
        steps = sorted(path for path in place.glob("step-*") if path.is_dir() and fits(path))
        pointer = place / POINTER
        pointed = place / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
        if steps:
            return pointed if pointed in steps else steps[-1]
    return None


def checkpoint_places(folder: Path) -> Iterator[Path]:
    """Where the checkpoints of a run may lie that `folder` is of."""
    yield folder
    yield folder / "checkpoints"
    try:
        yield folder / json.loads((folder / "run.json").read_bytes())["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):
        return


def _adapters(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("lora_*") if is_adapter(path))


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies in `folder`, in PEFT's format or diffusers'."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)
