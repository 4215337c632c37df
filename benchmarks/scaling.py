"""The tables of docs/scaling.md, from what was measured: benchmarks/results/scaling.json and plan_shards.json.

python -m benchmarks.scaling       writes them into the page anew
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.plan_shards import case_named, configuration
from benchmarks.plan_table import GIB
from benchmarks.wire import GLOO, sent_by_one
from glm_training.planning.plan import Card, make_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/scaling.md"
RESULTS = ROOT / "benchmarks/results"
ARMS = {
    "alone": "1 process",
    "ddp-2": "2, whole copies",
    "fsdp-2": "2, shards",
    "ddp-4": "4, whole copies",
    "fsdp-4": "4, shards",
    "hsdp-2x2": "4, 2 replicas of 2 shards",
}

NODE = 8
"""GPUs of a node, each with an InfiniBand port of its own."""
NVLINK, INFINIBAND = 315e9, 40e9
"""Bytes a second that a GPU sends within its node, and by its port: 70 % of NVLink 4's 450 GB/s each way, 80 % of
NDR's 400 Gbit/s. Assumed."""
COMPUTING = 0.4 * 989e12
"""Operations a second: 40 % of an H100's dense peak in bf16. Assumed."""
OPERATIONS = 8
"""Of a weight and token: 2 forward, 2 again in the backward pass (gradient checkpointing), 4 backward. Attention's own
are left out."""
ROW = {"ar": 1379, "dit": 4108}
"""Tokens of a picture of 1024 x 1024 px in `plan_peaks`: prompt and written ones; patches and quoted words."""


def read(name: str) -> dict[str, Any]:
    """A result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


# -- measured ----------------------------------------------------------------------------------------------------------


def measured() -> list[str]:
    """Step times, memory and bytes of the arms."""
    lines = [
        "| processes | s a step | of the processors | memory of one, GB | sent in a step by all, MB | last loss |",
        "|---|---|---|---|---|---|",
    ]
    report = read("scaling")
    for name, told in ARMS.items():
        arm = report[name]
        seconds, processor = arm["seconds_per_step"], arm["processor_seconds_per_step"]
        memory, sent = arm["memory"] / 1e9, arm["bytes_per_step"] / 1e6
        lines.append(
            f"| {told} | {seconds:.2f} | {processor:.2f} | {memory:.2f} | {sent:,.1f} | {arm['loss'][-1]:.5f} |"
        )
    return lines


def expected_bytes(arm: dict[str, Any]) -> float:
    """What all processes of an arm send in a step over gloo, by the calls of one of them."""
    by_one = sum(
        sent_by_one(name.split("/")[0], told["bytes"], int(name.split("/")[1]), GLOO)
        for name, told in arm["collectives"].items()
    )
    return arm["processes"] * by_one


def arithmetic() -> list[str]:
    """The calls of a step, what they amount to, and what was measured."""
    lines = [
        "| processes | calls of one in a step | worked out for all, MB | measured, MB | off |",
        "|---|---|---|---|---|",
    ]
    report = read("scaling")
    weights = 4 * report["trained_parameters"]
    for name, told in ARMS.items():
        arm = report[name]
        if not arm["collectives"]:
            continue
        calls = "; ".join(
            f"{each['calls']} x {kind.split('/')[0].replace('_', '-')} among {kind.split('/')[1]}, "
            f"{each['bytes'] / weights:.2f} W"
            for kind, each in arm["collectives"].items()
        )
        expected, sent = expected_bytes(arm), arm["bytes_per_step"]
        off = sent / expected - 1
        lines.append(f"| {told} | {calls} | {expected / 1e6:,.1f} | {sent / 1e6:,.1f} | {off:+.2%} |")
    return lines


# -- projected ---------------------------------------------------------------------------------------------------------


def seconds_of(kind: str, whole: float, group: int, spread: bool) -> float:
    """Of a collective call over so many whole bytes in a ring. `spread`: each of the group is on a node of its own, and
    the other GPUs of the nodes do the same among them. Else a group larger than a node has all GPUs of each, and as
    many rings: each passes the edge of a node by another port."""
    rate = INFINIBAND if spread else NVLINK if group <= NODE else min(NVLINK, NODE * INFINIBAND)
    return sent_by_one(kind, whole, group) / rate


def projection() -> list[str]:
    """Full finetuning of GLM-Image's halves: memory, bytes and seconds of a micro-batch of one picture for each GPU."""
    lines = [
        "| half | GPUs | peak by `plan`, GiB | a GPU sends, GB | communication, s | computing, s for a picture "
        "| as long from, pictures |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in read("plan_shards")["cases"]:
        case, gpus, size = case_named(each["name"]), each["processes"], each["shard_size"]
        calls = [(*name.split("/"), told["bytes"]) for name, told in each["collectives"].items()]
        sent = sum(sent_by_one(kind, whole, int(group)) for kind, group, whole in calls)
        # all-reduces of gradients are among replicas, one GPU of each node
        seconds = sum(seconds_of(kind, whole, int(group), kind == "all_reduce") for kind, group, whole in calls)
        computing = OPERATIONS * each["trained_parameters"] * ROW[case.network] / COMPUTING
        plan = make_plan(configuration(case), gpus=gpus, card=Card(None, ""), strategy="fsdp", shards=size)
        spread = f"{gpus}" if size == gpus else f"{gpus}, `shard_size: {size}`"
        lines.append(
            f"| {case.network} | {spread} | {plan.peak.total / GIB:.1f} | {sent / 1e9:.1f} | {seconds:.2f} "
            f"| {computing:.2f} | {seconds / computing:.1f} |"
        )
    return lines


TABLES = {
    re.compile(r"\| processes \| s a step.*?(?=\n\n)", re.DOTALL): measured,
    re.compile(r"\| processes \| calls.*?(?=\n\n)", re.DOTALL): arithmetic,
    re.compile(r"\| half \| GPUs.*?(?=\n\n)", re.DOTALL): projection,
}


def rewritten(text: str) -> str:
    """The page with its tables as they are worked out now."""
    for table, made in TABLES.items():
        lines = "\n".join(made())
        text = table.sub(lambda _, lines=lines: lines, text)
    return text


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
