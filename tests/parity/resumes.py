"""A run that one set of processes saved half the way and another goes on with: every pair of strategies and sizes.

    python -m tests.parity.resumes --out benchmarks/results/resumes.json

One process, 2 and 4 with whole copies (DDP) or shards (FSDP), and 2 x 2 with replicas (HSDP) run four steps each and
save after two; each of them goes on from each of these for the other two. Against one process without a stop: the
largest difference of a trained tensor, as a share of its own movement in the four steps. And whether every tensor of
the last checkpoint, moments among them, is the same bit for bit as without a stop, which it must be where those that go
on are as many, and share the work, as those that saved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quickstart import machine
from glm_training.checkpoint.resume import load_checkpoint
from glm_training.utils.distributed import World
from tests.dmdr_runs import random_scorers
from tests.parity.arms import LEAST, SECONDS, SHARE, furthest
from tests.parity.arms_worker import STEPS, place_of
from tests.parity.launching import run_processes
from tests.parity.resumes_worker import ARMS, WAYS, checkpoint_of, trainer
from tests.runs import weights_of
from tests.same import flat

CASES = (
    "grpo-both/adam/whole",
    "sft/adam/adapters",
    "dpo-sdxl/adam/whole",
    "dmdr/adam/adapters",
    "vgt-generator/adam/whole",
)


def outcomes(folder: Path, case: str) -> dict[tuple[str, str], tuple[float, bool]]:
    """By who saved and who went on: the share, and whether all is as without a stop. Raises AssertionError where a
    process fails."""
    scorers = [*random_scorers(folder / "scorers"), "dmdr.reward.decoder=vae", "dmdr.dynamic_steps=4"]
    for origins in ([""], WAYS):
        for processes in ARMS:
            words = (str(folder), case, ",".join(origins), *scorers)
            run_processes(processes, "resumes_worker.py", *words, seconds=SECONDS)
    before = weights_of(trainer(folder, case, WAYS[0], None, World(), scorers))
    after = tensors(place_of(folder, case, WAYS[0]), STEPS)
    moved = {
        name: furthest(after[name], value)
        for part, weights in before.items()
        for name, value in ((f".{part}_weights.{key}", value) for key, value in weights.items())
    }
    assert max(moved.values()) >= LEAST, "nothing learned"
    found = {}
    for origin in WAYS:
        for way in WAYS:
            ended = tensors(place_of(folder, case, f"{origin}-to-{way}"), STEPS)
            share = max(furthest(ended[name], after[name]) / max(moved[name], LEAST) for name in moved)
            unbroken = tensors(place_of(folder, case, way), STEPS)
            same = unbroken.keys() == ended.keys() and all(torch.equal(unbroken[name], ended[name]) for name in ended)
            found[origin, way] = share, same
    return found


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by its place."""
    return dict(flat(load_checkpoint(checkpoint_of(run, step)), ""))


def main() -> None:
    """Runs case after case and writes what came out. Exits with 1 where an outcome is not what it ought to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, help="as in arms.json; else a few kinds")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "seconds": 0, "cases": {}}
    started, good = time.perf_counter(), True
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes(Path(folder), case)
        report["cases"][case] = {
            f"{origin} to {way}": {"share": float(f"{share:.2g}"), "bit for bit": same}
            for (origin, way), (share, same) in found.items()
        }
        good &= all(share <= SHARE and (same or origin != way) for (origin, way), (share, same) in found.items())
        report["seconds"] = round(time.perf_counter() - started)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        worst = max(found, key=lambda pair: found[pair][0])
        print(f"{case}: at most {found[worst][0]:.2g} of its movement, {' to '.join(worst)}", flush=True)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
