"""A checkpoint of a run: what goes into it besides its states, what is never written, and the copies laid beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from glm_training.checkpoint.commit import checkpoint_name, save_checkpoint
from glm_training.checkpoint.state_tree import StateTree
from glm_training.config import Config
from glm_training.engine.errors import NonFiniteError
from glm_training.engine.resuming import save_context
from glm_training.models.family import Family
from glm_training.models.lora import has_lora
from glm_training.utils.failures import beside_training

Fill = Callable[[Path], None]


def commit_run(
    config: Config,
    family: Family,
    step: int,
    state: Mapping[str, StateTree],
    *,
    parts: Iterable[str],
    exports: Mapping[str, Fill],
    shown: Callable[[], AbstractContextManager[None]],
    digests: dict[str, str],
) -> Path:
    """Commits a checkpoint of `state` after `step` steps, on the main process: with the pipeline, the adapters and the
    further `exports`, as the model is while it is `shown`. `parts` are the names of what is trained. Gives its folder.

    Raises NonFiniteError, before anything is written, for trained weights or optimizers that are not finite; SaveError
    and DiskFullError where the disk does not take it. What fails once it is committed is told.
    """
    settings = config.checkpoint
    _require_finite(step, state, parts)
    adapted = [name for name in config.parts() if has_lora(family.module(name))]
    extra, extra_bytes = dict(exports), 0
    if not (adapted and settings.save_lora_only):
        extra_bytes = family.pipeline_bytes()
        extra["pipeline"] = lambda folder: family.save_pretrained(folder, merge_lora=bool(adapted))
    for name in adapted:
        extra[f"lora_{name}"] = partial(family.save_lora, name)
    extra = {name: partial(_fill_as_shown, fill, shown) for name, fill in extra.items()}
    path = save_checkpoint(
        config.checkpoint_dir(),
        step,
        state,
        total_limit=settings.save_total_limit,
        metadata=save_context(config, digests),
        extra_dirs=extra,
        extra_bytes=extra_bytes,
    )
    if settings.save_lora:
        for name in adapted:
            with beside_training("copying adapters to checkpoint.lora_dir", f"they are in {path}; the run goes on"):
                folder = config.lora_dir() / checkpoint_name(step) / name
                with shown():
                    _fill_whole(folder, config.lora_dir() / f".partial-{name}", partial(family.save_lora, name))
    return path


def _fill_as_shown(fill: Fill, shown: Callable[[], AbstractContextManager[None]], folder: Path) -> None:
    # around this folder alone: the states of the checkpoint are those of the training
    with shown():
        fill(folder)


def _require_finite(step: int, state: Mapping[str, StateTree], parts: Iterable[str]) -> None:
    """Weights that are lost must not push out checkpoints that are not. Each device is waited for once."""
    own = tuple(f"{part}_" for part in parts)  # others may hold NaN, as scores do where a metric does not apply
    names: dict[torch.device, list[str]] = {}
    flags: dict[torch.device, list[Tensor]] = {}
    for kind in (kind for kind in state if kind.startswith(own)):
        for name, tensor in _tensors(state[kind], kind):
            names.setdefault(tensor.device, []).append(name)
            flags.setdefault(tensor.device, []).append(tensor.isfinite().all())
    finite = {device: torch.stack(found).tolist() for device, found in flags.items()}
    lost = [
        name for device, known in names.items() for name, fine in zip(known, finite[device], strict=True) if not fine
    ]
    if lost:
        raise NonFiniteError(
            f"after step {step}, {len(lost)} trained tensors and moments of the optimizer are not finite (first "
            f"{lost[0]}): no checkpoint is made of them. Go back to an earlier one, with a lower learning rate, "
            "a training.max_grad_norm, or training.mixed_precision bf16 or no"
        )


def _tensors(tree: StateTree, path: str) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of a tree, with their places."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _tensors(value, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _tensors(value, f"{path}.{index}")


def _fill_whole(folder: Path, fresh: Path, fill: Fill) -> None:
    """`folder` with what `fill` writes into `fresh`, each file whole or not at all. What a killed run left in `fresh`
    goes."""
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        fill(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        for path in fresh.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
