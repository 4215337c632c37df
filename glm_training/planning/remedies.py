"""What to change where a run does not fit, in the order in which it costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from glm_training.config import Config, ConfigError
from glm_training.config.loading.load import changed
from glm_training.engine.gathers import may_choose, needs_whole
from glm_training.engine.sharding import strategy_problems, unshardable, update_problems, whole_fits
from glm_training.planning.memory import Memory
from glm_training.planning.run import Run, read_run

WORTH = 1 << 27
"""Bytes below which a change is not worth its mention."""

WAITING = "distributed.offload=true"

SLOWER = ("training.offload_between_phases", WAITING, "distributed.gather")
"""Changes that cost much time: they must save a twentieth of the peak."""

NOT_FOR_VGT = ("rollout.vae", "distributed.gather", "lora.", "model.quantization", "data.image_size")
"""Beginnings of changes that VGT does not know: it has no adapters, and its sizes are multiples of another stride."""


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration, as it is written on the command line; bytes that it saves beyond those before it,
    and the peak with all of them."""

    change: str
    saves: float
    peak: float


def chosen_run(config: Config, gpus: int, memory_of: Callable[[Run], Memory], card: float | None) -> Run:
    """The run of a configuration on GPUs of `card` bytes each: as `engine.sharding.choose`, `auto` comes to FSDP where
    whole copies do not fit and shards are to be had, else to DDP, and as `engine.gathers` to halves that draw whole or
    block by block; without a card, to DDP and whole halves."""
    run = read_run(config, gpus=gpus)
    if card is None or gpus == 1:
        return run
    if config.distributed.strategy == "auto" and not (
        whole_fits(memory_of(run).resident(), card) or unshardable(config)
    ):
        run = read_run(config, gpus=gpus, strategy="fsdp")
    if config.distributed.gather != "auto" or run.strategy != "fsdp" or not may_choose(config):
        return run
    by_block = [part for part in memory_of(run).drawn_by_block(card) if not needs_whole(config, part)]
    return replace(run, by_block=tuple(by_block))


def remedies(config: Config, run: Run, memory_of: Callable[[Run], Memory], card: float) -> list[Remedy]:
    """Changes of `config`, whose run is `run`, one after the other, until the peak is at most `card` bytes; all of
    them where that is not reached. Each is one that the configuration takes beside those before it, and that saves
    memory then, with what `distributed.strategy: auto` comes to under it. Where shards do not fit with any of them,
    or only where they wait on the CPU, adapters on whole copies in few bits may, which are faster."""
    found = _taken(config, run, memory_of, card, _changes(config, run))
    waits = any(each.change == WAITING for each in found)
    if run.strategy != "fsdp" or (found and found[-1].peak <= card and not waits):
        return found
    whole = _taken(config, run, memory_of, card, chain(_few_bits("distributed.strategy=ddp "), _changes(config, run)))
    return whole if whole and whole[-1].peak <= card else found


def _taken(
    config: Config, run: Run, memory_of: Callable[[Run], Memory], card: float, changes: Iterable[str]
) -> list[Remedy]:
    found: list[Remedy] = []
    peak = memory_of(run).peak().total
    for change in changes:
        if peak <= card:
            break
        if run.family == "vgt" and change.startswith(NOT_FOR_VGT):
            continue
        tried = _with(config, change, run.gpus)
        if tried is None:
            continue
        planned = chosen_run(tried, run.gpus, memory_of, card)
        after = memory_of(planned).peak().total
        if peak - after >= (peak / 20 if change.startswith(SLOWER) else WORTH):
            found.append(Remedy(change, peak - after, after))
            config, run, peak = tried, planned, after
    return found


def _with(config: Config, change: str, gpus: int) -> Config | None:
    """`config` with a change, None where the two do not go together."""
    try:
        tried = changed(config, change.split())
    except ConfigError:
        return None
    return None if strategy_problems(tried, gpus) or update_problems(tried, gpus) else tried


def _changes(config: Config, run: Run) -> Iterator[str]:
    """First what changes no result, then what rounds otherwise or costs time, then what trains otherwise."""
    training, parts = config.training, config.parts()
    yield "cache.enabled=true"
    yield "training.gradient_checkpointing=true"
    yield "rollout.vae_batch_size=1"
    for count in (4, 2, 1):
        if run.micro is None or count < run.micro:
            yield f"rollout.micro_batch_size={count}"
    prompts = training.batch_size * training.gradient_accumulation_steps
    for size in range(1, training.batch_size):  # the smallest that divides into the updates on it
        if training.batch_size % size == 0:
            yield f"training.batch_size={size} training.gradient_accumulation_steps={prompts // size}"
    yield "model.torch_dtype=bfloat16"
    yield "training.mixed_precision=bf16"
    if run.gpus > 1:
        yield "distributed.strategy=fsdp"
        yield "distributed.gather=block"
    own = [part for part in parts if getattr(config.optimizer, part).name is not None]
    shared = ["training.optimizer=adamw_8bit"] if len(own) < len(parts) else []
    yield " ".join([*shared, *(f"optimizer.{part}.name=adamw_8bit" for part in own)])
    yield "training.offload_between_phases=true"
    if run.gpus > 1:
        yield WAITING
    whole = [part for part in parts if part in ("ar", "dit", "unet") and not config.lora_for(part).enabled]
    own = [part for part in whole if getattr(config.lora, part).enabled is not None]
    if whole:
        yield " ".join(["lora.enabled=true"] * (len(own) < len(whole)) + [f"lora.{part}.enabled=true" for part in own])
    yield from _few_bits()
    if run.height * run.width > 512 * 512:
        yield "data.image_size.height=512 data.image_size.width=512"


def _few_bits(before: str = "") -> Iterator[str]:
    for kind in ("int8", "nf4"):
        yield f"{before}model.quantization={kind}"
