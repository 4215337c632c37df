"""Whether the run fits on the GPUs here, by the arithmetic of `planning`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from glm_training.config import Config
from glm_training.doctor.commands import Asked, glm_train, python
from glm_training.doctor.findings import Finding, failed, note, ok
from glm_training.doctor.worker import configuration
from glm_training.engine.errors import SettingsError
from glm_training.models.loading import ModelLoadError
from glm_training.planning.plan import Card, Plan, make_plan

NAME = "memory"
GIB = 1 << 30
CARDS = (16, 24, 32, 48, 80, 96, 141, 192)
"""GiB of GPUs that are to be had."""

LARGE = 1_000_000_000
"""Parameters from which on training on a CPU is no use."""


def memory(asked: Asked) -> Iterator[Finding]:
    """The peak of the plan against the smallest GPU, of one process and of as many as there are GPUs."""
    config = configuration(asked)
    sizes = _cards(config)
    try:
        plan = make_plan(config, card=Card(min(sizes, default=None), "here"))
    except (ModelLoadError, SettingsError) as error:
        yield note(NAME, str(error))
        return
    peak = f"{plan.peak.total / GIB:.1f} GiB ({plan.peak.name})"
    if not sizes:
        yield _without_gpu(plan, peak, asked)
    elif plan.fits:
        yield ok(NAME, f"{peak} of {min(sizes) / GIB:.1f} on a GPU", peak=plan.peak.total, card=min(sizes))
    elif (shared := _shared(config, plan.card, len(sizes))) is not None:
        told = f"{peak} is too much for one GPU of {min(sizes) / GIB:.1f}; {len(sizes)} share it:"
        parts = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(len(sizes))]
        program = [python(), *parts, "-m", "glm_training.cli.main", "train", *asked.words()]
        yield failed(NAME, told, [*program, f"distributed.strategy={shared.run.strategy}"])
    else:
        yield _too_large(plan, peak, min(sizes), asked)


def _shared(config: Config, card: Card, gpus: int) -> Plan | None:
    """The plan on all `gpus`, where there are several and it fits."""
    try:
        plan = make_plan(config, gpus=gpus, card=card) if gpus > 1 else None
    except SettingsError:  # what it asks for is for one process
        return None
    return plan if plan is not None and plan.fits else None


def _cards(config: Config) -> list[int]:
    if not torch.cuda.is_available() or config.model.device_map == "cpu":
        return []
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def _without_gpu(plan: Plan, peak: str, asked: Asked) -> Finding:
    parameters = sum(part.total for part in plan.memory.parts)
    if parameters < LARGE:
        return ok(NAME, f"{parameters / 1e6:.1f} million parameters train on the CPU")
    enough = _roomy(plan)
    told = f"{parameters / 1e9:.1f} billion parameters need a GPU, and there is none here: the peak is {peak}"
    if enough:
        command = glm_train("plan", asked, "--gpu-memory", str(enough[0]))
        return failed(NAME, f"{told}. One of {enough[0]} GiB has room, as this works out:", command)
    return failed(NAME, f"{told}, more than any has. What to change:", glm_train("plan", asked, "--gpu-memory", "80"))


def _too_large(plan: Plan, peak: str, card: int, asked: Asked) -> Finding:
    told = f"the peak is {peak}, and the GPU has {card / GIB:.1f}"
    facts = {"peak": plan.peak.total, "card": card}
    if plan.remedies and plan.remedies[-1].peak <= card:
        changed = [word for remedy in plan.remedies for word in remedy.change.split()]
        return failed(NAME, f"{told}; with these keys it fits:", glm_train("train", asked, *changed), **facts)
    enough = _roomy(plan)
    larger = str(enough[0] if enough else CARDS[-1])
    told += f", which no key mends; take a GPU of {larger} GiB, as this works out:"
    return failed(NAME, told, glm_train("plan", asked, "--gpu-memory", larger), **facts)


def _roomy(plan: Plan) -> list[int]:
    """The sizes that are enough; of what is on the box, a GPU of 48 or 80 GB gives programs some per cent less."""
    return [size for size in CARDS if 0.97 * size * GIB >= plan.peak.total]
