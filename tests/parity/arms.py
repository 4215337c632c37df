"""Kinds of training under ways to share their work, against one process: as many steps, the same weights.

    python -m tests.parity.arms --out benchmarks/results/arms.json

runs all of them, or of the kinds that are named; test_arms runs some. The file is written after each kind: of each case
how far the tensor of each part that moved most has gone on one process, and of each strategy the largest difference of
a tensor, as a share of its own movement.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quickstart import machine
from glm_training.utils.distributed import World
from tests.dmdr_runs import random_scorers
from tests.parity.arms_worker import ARMS, CASES, KINDS, STEPS, Weights, place_of, trainer_of, weights_after
from tests.parity.launching import run_processes
from tests.runs import weights_of

SHARE, LEAST = 0.01, 1e-4
"""Of its movement, by how much a tensor may differ; and the least movement of what learns, which is also what tensors
that move less are held against."""
SECONDS = 900
"""That a group of processes may take, on a machine that others use too."""

Pair = tuple[str, str]
"""A case and an arm."""
ALL: list[Pair] = [(case, arm) for case in CASES for arms in ARMS.values() for arm in arms]


@dataclass(frozen=True)
class Outcome:
    """Of a case under an arm. moved: by part, how far the tensor that moved most has gone on one process. tensor: the
    one that differs most, by `share` of its movement."""

    moved: dict[str, float]
    tensor: str
    share: float


def outcomes(folder: Path, pairs: Sequence[Pair]) -> dict[Pair, Outcome]:
    """Every pair, run and compared. Raises AssertionError where a process fails or processes differ."""
    scorers = [*random_scorers(folder / "scorers"), "dmdr.reward.decoder=vae", "dmdr.dynamic_steps=4"]
    alone = {}  # which writes the files that the others read
    for case in dict.fromkeys(case for case, _ in pairs):
        trainer = trainer_of(folder, case, "alone", World(), scorers)
        alone[case] = weights_of(trainer), weights_after(trainer)
    for processes, arms in ARMS.items():
        words = ",".join(f"{case}:{arm}" for case, arm in pairs if arm in arms)
        if words:
            run_processes(processes, "arms_worker.py", str(folder), words, *scorers, seconds=SECONDS)
    return {(case, arm): compared(folder, case, arm, *alone[case]) for case, arm in pairs}


def compared(folder: Path, case: str, arm: str, before: Weights, after: Weights) -> Outcome:
    """What the processes of an arm wrote against the weights of one process before and after its steps."""
    files = sorted(place_of(folder, case, arm).glob("weights-*.pt"))
    ranks = [torch.load(file, weights_only=True) for file in files]
    assert len(ranks) == next(processes for processes, arms in ARMS.items() if arm in arms)
    moved, shares = {}, {}
    for part, weights in after.items():
        went = {name: furthest(value, before[part][name]) for name, value in weights.items()}
        moved[part] = max(went.values())
        for name, value in weights.items():
            assert all(torch.equal(ranks[0][part][name], other[part][name]) for other in ranks), "processes differ"
            shares[f"{part}.{name}"] = furthest(ranks[0][part][name], value) / max(went[name], LEAST)
    worst = max(shares, key=shares.__getitem__)
    return Outcome(moved, worst, shares[worst])


def furthest(left: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference."""
    return (left - right).abs().max().item()


def main() -> None:
    """Runs kind after kind and writes what came out. Exits with 1 where an outcome is not what it ought to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = {"machine": machine(), "torch": torch.__version__, "steps": STEPS, "seconds": 0.0, "cases": {}}
    started, good = time.perf_counter(), True
    for kind in args.kinds or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            found = outcomes(Path(folder), [pair for pair in ALL if pair[0].split("/")[0] == kind])
        for (case, arm), outcome in found.items():
            told = report["cases"].setdefault(case, {"moved": {k: float(f"{v:.3g}") for k, v in outcome.moved.items()}})
            told[arm] = float(f"{outcome.share:.2g}")
            good &= outcome.share <= SHARE and min(outcome.moved.values()) >= LEAST
            print(f"{case} {arm}: {outcome.share:.2g} of its movement, {outcome.tensor}", flush=True)
        report["seconds"] = round(time.perf_counter() - started)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
