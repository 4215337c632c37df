"""Peaks of memory of one process of several that hold shards, measured against those that `glm-train plan` works out.

    python -m benchmarks.plan_shards > benchmarks/results/plan_shards.json

Full finetuning of a half of GLM-Image at its published size, in bf16 over fp32 shards, as `engine/sharding.py` shards
it: two micro-batches beside the moments of an earlier step. Tensors are fake (of the CPU), and the group of processes
is: no collective call moves anything, so that one process stands for 8 or 64. torch's FSDPMemTracker sums the bytes
that are alive, gathered blocks and their buffers among them; the optimizer's step, in which it counts temporaries at
the size of the whole tensors, is left to `plan_peaks`. collectives: the calls of one micro-batch of one process, and
the whole tensors in them. Prints JSON; peaks in GiB.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.plan_peaks import CASES, GIB, GLYPHS, PROMPT, Case, filled, forward_of, network_of
from benchmarks.plan_table import WHOLE
from benchmarks.wire import Collectives
from glm_training.config import Config, load_config
from glm_training.engine.sharding import Shards
from glm_training.models.glm_image.tiny import build_tiny
from glm_training.planning.memory import Memory
from glm_training.planning.models import read_networks
from glm_training.planning.run import read_run
from glm_training.planning.tracing import faking
from glm_training.utils.distributed import World

ROOT = Path(__file__).parents[1]
NAMES = ("dit full 1024", "ar full 1024")
SHARED = ((8, 8), (64, 64), (64, 8))
"""Processes, and how many of them share a set of shards."""
ELSEWHERE = ("weights", "rewards", "context")
"""Of a phase: other networks, and what no tensor holds."""


def case_named(name: str) -> Case:
    """Of `plan_peaks`, which trains it in one process."""
    return next(case for case in CASES if case.name == name)


def configuration(case: Case, shard_size: int | None = None) -> Config:
    """Of a run that trains as the case does."""
    keys = {
        "model.component": case.network,
        "training.use_reward": "false",
        "training.batch_size": case.rows,
        "training.mixed_precision": "bf16",
        "training.optimizer": "adamw",
        "data.image_size.height": case.side,
        "data.image_size.width": case.side,
        "distributed.strategy": "fsdp",
        "distributed.shard_size": "null" if shard_size is None else shard_size,
    }
    return load_config([str(ROOT / "configs/t2i_training.yaml")], [*WHOLE, *(f"{k}={v}" for k, v in keys.items())])


def measure(case: Case, processes: int, shard_size: int) -> tuple[int, Collectives, int]:
    """Peak bytes of forward and backward passes with gradients there, in the first of so many processes; the calls of a
    micro-batch; and how many parameters are trained."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        shards = Shards(configuration(case, shard_size), World(0, processes))  # its mesh is made of real tensors
        network, pipeline = network_of(case), build_tiny()
        with faking():
            return _peaks(case, shards, network, pipeline)
    finally:
        dist.destroy_process_group()


def _peaks(case: Case, shards: Shards, network: Any, pipeline: Any) -> tuple[int, Collectives, int]:
    filled(network, case)
    network.train()
    component, forward = forward_of(case, network, pipeline)
    names: Any = component.sharding_units
    units = [module for module in component.modules() if type(module).__name__ in names]
    shards.shard(component, units, [network.model.visual, network.model.vqmodel] if case.network == "ar" else [])
    trained = [parameter for parameter in component.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=True)

    def micro_batch() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward()
        loss.backward()

    micro_batch()
    optimizer.step()  # from here on there are moments
    optimizer.zero_grad()
    tracker = FSDPMemTracker(component, optimizer)
    with tracker:
        for _ in range(2):
            tracker.reset_mod_stats()  # the peak stays
            micro_batch()
    peak = sum(sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    with Collectives() as collectives:
        micro_batch()
    return peak, collectives, sum(parameter.numel() for parameter in trained)


def worked_out(case: Case, processes: int, shard_size: int) -> float:
    """The same peak by the formulas of `glm_training.planning`."""
    config = configuration(case, shard_size)
    run = replace(read_run(config, gpus=processes), prompt_tokens=PROMPT, glyph_tokens=GLYPHS)
    phases = Memory(run, read_networks(config.model.family, config.model.name)).phases()
    passes = next(phase for phase in phases if phase.name.endswith("forward and backward"))
    return sum(size for name, size in passes.items.items() if name not in ELSEWHERE)


def main() -> None:
    """Prints what was measured as JSON; on standard error how far off the formulas are."""
    found = []
    for name in NAMES:
        for processes, size in SHARED:
            case = case_named(name)
            peak, collectives, count = measure(case, processes, size)
            off = worked_out(case, processes, size) / peak - 1
            print(
                f"{name} on {processes}, {size} shards: {peak / GIB:.3f} GiB, {off:+.1%}", file=sys.stderr, flush=True
            )
            found.append(
                {
                    "name": name,
                    "processes": processes,
                    "shard_size": size,
                    "trained_parameters": count,
                    "passes": round(peak / GIB, 3),
                    "collectives": collectives.told(),
                }
            )
    print(json.dumps({"torch": torch.__version__, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
