"""The whole plan of a run, for people and for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from glm_training.config import Config
from glm_training.config.loading.load import changed
from glm_training.engine.errors import SettingsError
from glm_training.engine.sharding import strategy_problems, update_problems
from glm_training.planning.counting import Phase
from glm_training.planning.disk import Disk, checkpoints
from glm_training.planning.memory import Memory
from glm_training.planning.models import read_networks
from glm_training.planning.remedies import Remedy, chosen_run, remedies
from glm_training.planning.run import Run
from glm_training.planning.schedule import Schedule, schedule
from glm_training.utils.metrics_file import METRICS


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in bytes, None where none was named or found; `origin` in words."""

    size: float | None
    origin: str


@dataclass(frozen=True)
class Plan:
    """What a run takes. rate: images per second and GPU, None where it is not known, from `rate_origin`."""

    run: Run
    origin: str
    memory: Memory
    phases: list[Phase]
    card: Card
    remedies: list[Remedy]
    disk: Disk
    schedule: Schedule
    rate: float | None
    rate_origin: str
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the card; None without one."""
        return None if self.card.size is None else self.peak.total <= self.card.size

    def as_json(self) -> str:
        """All of it. Sizes are bytes, of one GPU where memory is meant."""
        halves = [{**asdict(half), "copies": list(half.copies)} for half in self.run.halves]
        told: dict[str, Any] = {
            "model": {"origin": self.origin},
            "run": {**asdict(self.run), "halves": halves},
            "parameters": [
                {"part": p.name, "total": p.count, "trained": p.trained_count, "frozen": p.frozen}
                for p in self.memory.parts
            ],
            "memory": [{"phase": phase.name, "total": phase.total, **phase.items} for phase in self.phases],
            "peak": {"phase": self.peak.name, "total": self.peak.total},
            "card": {"size": self.card.size, "origin": self.card.origin, "fits": self.fits},
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "checkpoint": {
                "items": self.disk.items, "total": self.disk.each, "held": self.disk.held, "free": self.disk.free,
                "fits": self.disk.fits,
            },
            "schedule": {**asdict(self.schedule), "days": self.days},
            "rate": {"images per second and GPU": self.rate, "origin": self.rate_origin},
            "notes": self.notes,
        }  # fmt: skip
        return json.dumps(told, indent=1)

    @property
    def days(self) -> float | None:
        """Of the run, where rate and steps are known."""
        return None if self.rate is None else self.schedule.days(self.rate, self.run.gpus)


def make_plan(
    config: Config, *, gpus: int = 1, card: Card, rate: float | None = None, strategy: str | None = None,
    shards: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a configuration. `rate`: images per second and GPU; without it that of the run's own log, where it
    has one. Raises ModelLoadError for a model whose configurations are neither here nor published, SettingsError for a
    configuration that so many GPUs cannot follow."""
    config = _shared(config, strategy, shards)
    problems = [*strategy_problems(config, gpus), *update_problems(config, gpus)]
    if problems:
        raise SettingsError("\n".join(problems))
    origin, memory_of = _memory_of(config)
    run = chosen_run(config, gpus, memory_of, card.size)
    memory = memory_of(run)
    lacking = [] if card.size is None else remedies(config, run, memory_of, card.size)
    measured = None if rate is not None else _measured_rate(config)
    rate_origin = "as given" if rate is not None else f"measured, {config.output_dir / METRICS}" if measured else ""
    return Plan(
        run=run,
        origin=origin,
        memory=memory,
        phases=memory.phases(),
        card=card,
        remedies=lacking,
        disk=checkpoints(config, memory),
        schedule=schedule(config, run),
        rate=rate if measured is None else measured / gpus,
        rate_origin=rate_origin,
        notes=_notes(config, run),
    )


def _shared(config: Config, strategy: str | None, shards: int | None) -> Config:
    """`config` with the strategy and the number of shards that the plan is asked for; DDP has none."""
    asked = [f"distributed.strategy={strategy}"] * (strategy is not None)
    asked += [f"distributed.shard_size={shards}"] * (shards is not None)
    if strategy == "ddp":
        asked += ["distributed.offload=false"] + ["distributed.shard_size=null"] * (shards is None)
    return changed(config, asked) if asked else config


def _memory_of(config: Config) -> tuple[str, Callable[[Run], Memory]]:
    """Where the networks' configurations come from, and the memory of runs of them. Raises ModelLoadError."""
    if config.model.family == "vgt":
        from glm_training.planning.vgt import VGTMemory, read_vgt

        found = read_vgt(config)
        return found.origin, lambda run: VGTMemory(run, found)
    networks = read_networks(config.model.family, config.model.name, config.model.revision)
    return networks.origin, lambda run: Memory(run, networks)


def _measured_rate(config: Config) -> float | None:
    """The last `images_per_second` of the run's log, of all its processes together."""
    path = config.output_dir / METRICS
    if not path.is_file():
        return None
    rates = [record["images_per_second"] for line in path.read_text(encoding="utf-8").splitlines()
             if "images_per_second" in (record := _record(line))]  # fmt: skip
    return rates[-1] if rates else None


def _record(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:  # a line that a killed run left torn
        return {}
    return found if isinstance(found, dict) else {}


def _notes(config: Config, run: Run) -> list[str]:
    """What the arithmetic leaves out or assumes for this run."""
    quoted = "" if run.family == "vgt" else f", quoted words of {run.glyph_tokens}"
    found = [f"assumed: prompts of {run.prompt_tokens} tokens{quoted}"]
    if config.data.buckets.enabled:
        found.append("pictures of other shapes have about the area of data.image_size, which is counted")
    if config.training.method == "dmdr":
        found.append("not counted: the decoder's activations where a differentiable reward looks at its pictures")
    if run.teachers and run.strategy == "fsdp":
        found.append("not counted: shards that are set aside while a teacher's stand in for them")
    if "adapters" in run.teachers:
        found.append("assumed: a teacher's adapters lie on the layers of lora.targets")
    if config.reward.calculator is not None or any(":" in name for name in run.metrics):
        found.append("not counted: the memory of a reward of your own")
    return found
