"""What to change where a run does not fit, in the order in which it costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from glm_training.config import Config
from glm_training.engine.sharding import SHARDABLE
from glm_training.planning.memory import Memory
from glm_training.planning.run import Half, Run

WORTH = 1 << 27
"""Bytes below which a change is not worth its mention."""

NOT_FOR_VGT = ("cache.", "rollout.vae", "lora.", "model.quantization", "data.image_size")
"""Beginnings of changes that VGT does not know: no encoder runs ahead of it, it has no adapters, and its sizes are
multiples of another stride."""


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration, as it is written on the command line; bytes that it saves beyond those before it,
    and the peak with all of them."""

    change: str
    saves: float
    peak: float


def remedies(config: Config, run: Run, memory_of: Callable[[Run], Memory], capacity: float) -> list[Remedy]:
    """Changes one after the other, each that saves memory, until the peak is at most `capacity` bytes; all of them
    where that is not reached."""
    found: list[Remedy] = []
    peak = memory_of(run).peak().total
    for change, changed in _changes(config):
        if run.family == "vgt" and change.startswith(NOT_FOR_VGT):
            continue
        if peak <= capacity:
            break
        tried = changed(run)
        if tried is None:
            continue
        after = memory_of(tried).peak().total
        if peak - after >= WORTH:
            found.append(Remedy(change, peak - after, after))
            run, peak = tried, after
    return found


Changed = Callable[[Run], Run | None]


def _changes(config: Config) -> Iterator[tuple[str, Changed]]:
    """First what changes no result, then what rounds otherwise, then what trains otherwise."""
    yield "cache.enabled=true", lambda run: None if run.caches else replace(run, caches=True)
    yield (
        "training.gradient_checkpointing=true",
        lambda run: None if run.checkpointing else replace(run, checkpointing=True),
    )
    yield "rollout.vae_batch_size=1", lambda run: replace(run, vae_micro=1) if run.method == "reward" else None
    for count in (4, 2, 1):
        yield f"rollout.micro_batch_size={count}", _micro(count)
    yield "training.batch_size=1 (and as many times the accumulation)", _batch_of_one
    yield "model.torch_dtype=bfloat16", lambda run: None if run.dtype == 2 else replace(run, dtype=2)
    yield "training.mixed_precision=bf16", lambda run: None if run.low else replace(run, low=2)
    yield "distributed.strategy=fsdp", _sharded
    yield "training.optimizer=adamw_8bit", _eight_bit
    yield "lora.enabled=true", _adapted
    for kind in ("int8", "nf4"):
        yield f"model.quantization={kind}", _in_few_bits(kind)
    yield "data.image_size.height=512 data.image_size.width=512", _smaller


def _micro(count: int) -> Changed:
    def changed(run: Run) -> Run | None:
        if run.micro is not None and run.micro <= count:
            return None
        return replace(run, micro=count, evaluated=min(run.evaluated, count))

    return changed


def _batch_of_one(run: Run) -> Run | None:
    if run.batch_size == 1:
        return None
    return replace(run, batch_size=1, accumulation=run.accumulation * run.batch_size)


def _sharded(run: Run) -> Run | None:
    if run.gpus == 1 or run.strategy == "fsdp" or any(half.optimizer not in SHARDABLE for half in run.halves):
        return None
    return replace(run, strategy="fsdp", shards=run.gpus)


def _in_few_bits(kind: Literal["int8", "nf4"]) -> Changed:
    def changed(run: Run) -> Run | None:
        whole = any(not half.lora.enabled for half in run.halves)
        return None if whole or run.strategy == "fsdp" or run.quantization == "nf4" else replace(run, quantization=kind)

    return changed


def _eight_bit(run: Run) -> Run | None:
    if run.strategy == "fsdp":
        return None
    return _of_halves(run, lambda half: replace(half, optimizer="adamw_8bit"))


def _adapted(run: Run) -> Run | None:
    def adapted(half: Half) -> Half:
        copies = tuple(name for name in half.copies if name != "reference")
        return replace(half, lora=replace(half.lora, enabled=True), copies=copies)

    return _of_halves(run, adapted)


def _of_halves(run: Run, change: Callable[[Half], Half]) -> Run | None:
    halves = tuple(map(change, run.halves))
    return None if halves == run.halves else replace(run, halves=halves)


def _smaller(run: Run) -> Run | None:
    return replace(run, height=512, width=512) if run.height * run.width > 512 * 512 else None
