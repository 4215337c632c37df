"""One process = two with whole copies (DDP) = two with shards (FSDP) = two replicas of two shards (HSDP), after four
steps of each kind of training, with SGD and with Adam, of whole weights and of adapters.

The suite takes a part: of each kind one case with Adam, and under HSDP one with SGD, adapters or whole weights in turn
(the other files here have two steps with SGD under DDP and FSDP). All:

    ARMS_SWEEP=all pytest -n 0 tests/parity/test_arms.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from glm_training.utils.distributed import World
from tests.dmdr_runs import random_scorers
from tests.parity.arms_worker import ARMS, CASES, KINDS, Weights, place_of, trainer_of, weights_after
from tests.parity.launching import run_processes
from tests.runs import weights_of

SHARE, LEAST = 0.01, 1e-4
"""Of its movement, by how much a tensor may differ; and the least movement of what learns, which is also what those
that move less are held against."""
SECONDS = 900
"""That a group of processes may take, on a machine that others use too."""


def taken(case: str, arm: str) -> bool:
    """Whether the suite runs it."""
    kind, rule, what = case.split("/")
    if rule == "sgd" and arm != "hsdp":
        return False
    if KINDS[kind].rate_of_adapters is None:
        return True
    adapters_by_adam = list(KINDS).index(kind) % 2 == 0
    return (what == "adapters") == (adapters_by_adam == (rule == "adam"))


ALL = os.environ.get("ARMS_SWEEP") == "all"
RUN = [(case, arm) for case in CASES for arms in ARMS.values() for arm in arms if ALL or taken(case, arm)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, tuple[Weights, Weights]]]:
    """Every case under every strategy; and its weights before and after on one process, which writes the files that the
    others read."""
    folder = tmp_path_factory.mktemp("arms")
    scorers = [*random_scorers(folder / "scorers"), "dmdr.reward.decoder=vae", "dmdr.dynamic_steps=4"]
    alone = {}
    for case in {case: None for case, _ in RUN}:
        trainer = trainer_of(folder, case, "alone", World(), scorers)
        alone[case] = weights_of(trainer), weights_after(trainer)
    for processes, arms in ARMS.items():
        pairs = ",".join(f"{case}:{arm}" for case, arm in RUN if arm in arms)
        run_processes(processes, "arms_worker.py", str(folder), pairs, *scorers, seconds=SECONDS)
    return folder, alone


@pytest.mark.parametrize(("case", "arm"), RUN)
def test_several_processes_come_to_the_weights_of_one(trained, case, arm):
    folder, alone = trained
    before, after = alone[case]
    files = sorted(place_of(folder, case, arm).glob("weights-*.pt"))
    ranks = [torch.load(file, weights_only=True) for file in files]
    assert len(ranks) == next(processes for processes, arms in ARMS.items() if arm in arms)
    for part, weights in after.items():
        moved = {name: (value - before[part][name]).abs().max().item() for name, value in weights.items()}
        assert max(moved.values()) >= LEAST, f"{part} did not learn"
        for name, value in weights.items():
            assert all(torch.equal(ranks[0][part][name], other[part][name]) for other in ranks), "ranks differ"
            off = (ranks[0][part][name] - value).abs().max().item()
            assert off <= SHARE * max(moved[name], LEAST), f"{part}.{name}: {off} of {moved[name]}"
