"""A checkpoint of a run: what goes into it besides its states, what is never written, and the copies laid beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from glm_training.checkpoint.commit import checkpoint_name, save_checkpoint
from glm_training.checkpoint.disk_errors import SaveError
from glm_training.checkpoint.manifest import FileRecord
from glm_training.checkpoint.shards import write_shards
from glm_training.checkpoint.state_tree import StateTree, encode, local_part
from glm_training.config import Config
from glm_training.engine.agreement import together
from glm_training.engine.best import BestCheckpoint
from glm_training.engine.errors import NonFiniteError, TrainingError
from glm_training.engine.parts import Part, as_shown
from glm_training.engine.resuming import save_context
from glm_training.engine.run_directory import RunDirectory
from glm_training.models.family import Family
from glm_training.models.lora import has_lora
from glm_training.utils.distributed import World, broadcast_object, gather_objects
from glm_training.utils.failures import beside_training

Fill = Callable[[Path], None]


def commit_run(
    config: Config,
    family: Family,
    step: int,
    state: Mapping[str, StateTree],
    *,
    exports: Mapping[str, Fill],
    shown: Callable[[], AbstractContextManager[None]],
    digests: dict[str, str],
    write_together: Callable[[str, Path], Mapping[str, FileRecord]] | None = None,
) -> Path:
    """Commits a checkpoint of `state` after `step` steps, on the main process: with the pipeline, the adapters and the
    further `exports`, as the model is while it is `shown`. Gives its folder.

    Raises SaveError and DiskFullError where the disk does not take it. What fails once it is committed is told.
    """
    settings = config.checkpoint
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
        write_together=write_together,
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


def commit(
    world: World,
    config: Config,
    family: Family,
    step: int,
    state: Mapping[str, StateTree],
    *,
    parts: Mapping[str, Part],
    directory: RunDirectory | None,
    best: BestCheckpoint,
    exports: Mapping[str, Fill],
    digests: dict[str, str],
) -> Path | None:
    """`commit_run`, unless something of `state` is not finite, on the main process, to which it gives the folder; or of
    parts that lie in shards, a collective: every process writes its own, the main one all else. `directory` is
    where it belongs, which is looked at first, and `best` what must be named before an older checkpoint goes.

    Pipeline and adapters of shards are written from copies that are gathered on the main process's CPU.
    """

    def confirm() -> None:
        if directory is not None:
            directory.confirm(config)
        best.settle()

    check, shown = partial(require_finite, step, state, parts), partial(as_shown, parts, "export")
    if not any(isinstance(part.component, FSDPModule) for part in parts.values()):
        check()
        confirm()
        return commit_run(config, family, step, state, exports=exports, shown=shown, digests=digests)
    try:
        together(world, "looking for weights that are not finite", check)
    except TrainingError as error:
        error.shared = True  # nobody waits for what would come next
        raise
    pipeline = not (config.checkpoint.save_lora_only and any(has_lora(family.module(p)) for p in config.parts()))
    with shown():
        whole = gather_parameters(world, [part.component for part in parts.values()], pipeline)
    crew = Crew(world, state)
    if not world.is_main:
        crew.follow()
        return None
    try:
        confirm()
        with standing_in(whole):
            keys: dict[str, Any] = {"exports": exports, "shown": nullcontext, "digests": digests}
            return commit_run(config, family, step, state, **keys, write_together=crew.write)
    finally:
        crew.release()


class Crew:
    """The processes that write their shards of `state` when the main one, which commits the checkpoint, tells them."""

    def __init__(self, world: World, state: Mapping[str, StateTree]) -> None:
        self.world, self.state = world, state

    def write(self, name: str, folder: Path) -> dict[str, FileRecord]:
        """On the main process: has all of them write a named state into `folder`, which they share; gives the files of
        all. Raises OSError and SaveError."""
        broadcast_object(self.world, (name, str(folder)))
        return self._write(name, folder)

    def follow(self) -> None:
        """On the others: does what is told, until the main process is done."""
        while (told := broadcast_object(self.world, None)) is not None:
            with suppress(OSError, SaveError):  # every process has it, and the main one tells
                self._write(told[0], Path(told[1]))

    def release(self) -> None:
        """On the main process: there is nothing more to write."""
        broadcast_object(self.world, None)

    def _write(self, name: str, folder: Path) -> dict[str, FileRecord]:
        own = write_shards(folder, encode(self.state[name], in_shards=True).tensors)
        return {file: record for each in gather_objects(self.world, own) for file, record in each.items()}


def gather_parameters(
    world: World, components: Iterable[nn.Module], frozen_too: bool
) -> list[tuple[nn.Module, str, Tensor]]:
    """The sharded parameters of `components` as whole tensors on the CPU of the main process, with the module and the
    name that each has there; the trained ones, or all. A collective; the other processes get none."""
    modules, found = dict.fromkeys(module for component in components for module in component.modules()), []
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()  # a step that was dropped before its backward pass leaves weights gathered
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and (frozen_too or parameter.requires_grad):
                # shards that wait on the CPU are gathered where the processes exchange tensors
                whole = parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
                if world.is_main:
                    found.append((module, name, whole.to("cpu")))
    return found


@contextmanager
def standing_in(whole: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Inside, whole parameters stand in for the shards, for what writes files; no forward pass may run."""
    shards = [(module, name, module._parameters[name]) for module, name, _ in whole]
    try:
        for module, name, tensor in whole:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        for module, name, parameter in shards:
            module._parameters[name] = parameter


def require_finite(step: int, state: Mapping[str, StateTree], parts: Iterable[str]) -> None:
    """Raises NonFiniteError for trained weights or optimizers that are not finite, of `parts` by name: weights that are
    lost must not push out checkpoints that are not. Of shards each process sees its own. Each device is waited for
    once."""
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
            yield path, local_part(tree)
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
