"""A plan as text of 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from glm_training.planning.counting import TAKEN_WHOLE, Part, Phase, moment_bytes
from glm_training.planning.passes import WIDE
from glm_training.planning.plan import Plan
from glm_training.utils.words import counted

GIB, MIB = 1 << 30, 1 << 20
WIDTH = 80

COLUMNS = {
    "frozen": ("weights", "gathered weights", "teachers"),
    "fp32": ("masters", "copies", "set aside"),
    "grads": ("gradients", "gradient buckets"),
    "moms": ("moments",),
    "activ": ("activations",),
    "KV": ("KV cache",),
    "store": ("rollout store", "pictures"),
    "score": ("rewards",),
    "rest": ("optimizer's temporaries", "context"),
}
"""Columns of the table of phases, and what each adds up."""

LEGEND = (
    "GiB of one GPU. frozen: weights that are not trained, and what is gathered of shards; fp32: "
    "those that are trained, and copies of them; grads: gradients, with DDP's or FSDP's buckets; "
    "moms: moments of the optimizer; activ: activations; KV: key/value cache; store: what a "
    "rollout keeps; score: networks of the metrics; rest: temporaries of the optimizer's step, and "
    "1 GiB that is assumed for CUDA itself."
)


def page(plan: Plan, name: str) -> list[str]:
    """The lines of a plan of the configuration `name`."""
    lines = [*_wrapped(f"plan of {name}: {_what(plan)}"), *_wrapped(f"model: {plan.origin}"), ""]
    lines += [*_parameters(plan.memory.parts), "", *_phases(plan.phases), "", *_peak(plan), ""]
    lines += [*_verdict(plan), "", *_schedule(plan), *_disk(plan)]
    return [*lines, *(line for note in plan.notes for line in _wrapped(note))]


def _what(plan: Plan) -> str:
    run = plan.run
    trained = " and ".join(
        f"{half.name} ({f'LoRA rank {half.lora.rank}' if half.lora.enabled else 'full'}, {half.optimizer})"
        for half in run.halves
    )
    spread = "" if run.strategy == "single" else f" by {run.strategy.upper()}"
    return f"{trained}, {run.method}, {run.width} x {run.height} px, {run.gpus} GPU{'s' * (run.gpus > 1)}{spread}"


def _parameters(parts: Sequence[Part]) -> list[str]:
    lines = [f"{'parameters, in millions':<32}{'total':>12}{'trained':>12}{'frozen':>12}"]
    rows = [(part.name, part.count, part.trained_count, part.frozen) for part in parts]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return lines + [f"{row[0]:<32}" + "".join(f"{count / 1e6:>12,.1f}" for count in row[1:]) for row in rows]


def _phases(phases: Sequence[Phase]) -> list[str]:
    name = 20
    lines = [f"{'memory by phase':<{name}}" + "".join(f"{column:>6}" for column in (*COLUMNS, "total"))]
    for phase in phases:
        cells = [sum(phase.items.get(item, 0.0) for item in items) for items in COLUMNS.values()]
        shown = "".join(f"{cell / GIB:>6.1f}" if cell else f"{'':>6}" for cell in cells)
        short = phase.name.replace("forward and backward", "passes").replace("optimizer step", "step")
        short = short.replace("discriminator", "discrim.")
        lines.append(f"{short:<{name}}{shown}{phase.total / GIB:>6.1f}")
    return [*lines, *_wrapped(LEGEND)]


def _peak(plan: Plan) -> list[str]:
    """The arithmetic behind the lasting items of the largest phase."""
    run, memory, peak = plan.run, plan.memory, plan.peak
    lines = [f"the peak is {peak.total / GIB:.1f} GiB ({peak.name}):"]
    trained = sum(memory.by_name[name].trained_count for name in peak.parts)
    spread = f" / {run.shards} GPUs" if run.shards > 1 else ""
    learning = [memory.by_name[name] for name in peak.moments]
    learnt = sum(part.trained_count for part in learning)
    moments = sum(moment_bytes(memory.halves[part.name].rule, part.trained) for part in learning)
    of_blocks = "a block's on its way" + (", and shards among replicas" if run.shards < run.gpus else "")
    told: dict[str, str] = {
        "weights": _frozen(plan, spread),
        "gathered weights": "of shards, whole while they compute",
        "masters": f"{trained / 1e9:.3f} billion trained x {WIDE} bytes{spread}",
        "moments": f"{learnt / 1e9:.3f} billion trained x {moments / max(learnt, 1):.2f} bytes{spread}",
        "copies": f"{_copies(plan)}, {WIDE} bytes each{spread}",
        "teachers": f"{len(run.teachers)} of what is trained, and of what else differs from the student{spread}",
        "set aside": f"weights while copies stand in for them{spread}",
        "gradients": f"{WIDE} bytes each{spread}",
        "gradient buckets": "DDP sends gradients in buckets of their own" if run.strategy == "ddp" else of_blocks,
        "optimizer's temporaries": _temporaries(plan) if peak.name.endswith("optimizer step") else "",
        "activations": "at most in a pass, " + ("traced" if run.family == "vgt" else "by formulas per block"),
        "rewards": f"{', '.join(run.metrics)}, in fp32",
        "context": "assumed for CUDA, its libraries and gaps",
    }
    return lines + [line for label, size in peak.items.items() for line in _item(label, size, told.get(label, ""))]


def _frozen(plan: Plan, spread: str) -> str:
    """`8.9 billion frozen x 2 bytes / 8 GPUs + 0.4 billion x 2 bytes`: of parts in shards, and of those on each GPU."""
    memory, counts = plan.memory, Counter[tuple[float, str]]()
    for part in (memory.by_name[name] for name in plan.peak.parts):
        if memory.here(part):
            counts.update({(size, spread if part.trained else ""): n for size, n in memory.frozen_sizes(part).items()})
    told = [f"{n / 1e9:.3f} billion x {size:.4g} bytes{where}" for (size, where), n in counts.items() if n]
    return " + ".join(told).replace("billion", "billion frozen", 1)


def _temporaries(plan: Plan) -> str:
    rule = next(half.rule for half in plan.run.halves if half.title in plan.peak.name)
    return "the step takes roots of all second moments at once" if rule in TAKEN_WHOLE else "of its largest tensor"


def _item(label: str, size: float, how: str) -> list[str]:
    return _wrapped(f"  {label:<24}{size / GIB:>7.2f}  {how}".rstrip(), indent=35)


def _verdict(plan: Plan) -> list[str]:
    if plan.card.size is None:
        return _wrapped(f"whether it fits is not said: {plan.card.origin}")
    size = f"{plan.card.size / GIB:.1f} GiB ({plan.card.origin})"
    if plan.fits:
        return [f"it fits: {plan.peak.total / GIB:.1f} of {size}"]
    lines = [f"IT DOES NOT FIT: {plan.peak.total / GIB:.1f} of {size}"]
    if not plan.remedies:
        return [*lines, "nothing in this configuration saves memory: take larger GPUs"]
    lines.append("what to change, in this order:")
    for remedy in plan.remedies:
        *first, change = [remedy.change] if len(remedy.change) <= 52 else remedy.change.split()
        lines += [f"  {part}" for part in first]
        lines.append(f"  {change:<52} -{remedy.saves / GIB:.1f} -> {remedy.peak / GIB:.1f} GiB")
    last = plan.remedies[-1].peak
    return lines if last <= plan.card.size else [*lines, "with all of that it still does not fit: take larger GPUs"]


def _schedule(plan: Plan) -> list[str]:
    found = plan.schedule
    updates = ", ".join(f"{count} of {name}" for name, count in found.updates.items())
    lines = [f"a step: {found.prompts} prompts, {found.images} images, updates: {updates}"]
    if found.steps is None:
        return [*lines, "the run: training items were not counted; name training.max_steps"]
    told = "" if found.items is None else f" ({found.items} training items)"
    lines.append(f"the run: {found.steps} steps, {found.steps * found.images} images{told}")
    if plan.days is None:
        return [*lines, "how long it takes: give --rate, images per second of a GPU"]
    return [*lines, f"at {plan.rate:g} images per second and GPU ({plan.rate_origin}): {plan.days:.2f} days"]


def _copies(plan: Plan) -> str:
    """`2 references, policy that draws`: what is kept beside the trained weights, over all halves."""
    names = Counter(name for half in plan.run.halves if half.name in plan.peak.parts for name in half.copies)
    return ", ".join(name if count == 1 else counted(count, name) for name, count in names.items())


def _disk(plan: Plan) -> list[str]:
    disk = plan.disk
    unit, name = (GIB, "GiB") if disk.each >= GIB else (MIB, "MiB")
    parts = " + ".join(f"{item} {size / unit:.1f}" for item, size in disk.items.items())
    held = "each is kept" if disk.held is None else f"{disk.held} at most at once"
    lines = _wrapped(f"a checkpoint: {disk.each / unit:.1f} {name} = {parts}; {held}")
    room = "enough" if disk.fits else f"TOO LITTLE for {disk.held or 2} checkpoints"
    return [*lines, f"free where they go: {disk.free / GIB:.1f} GiB, {room}"]


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
