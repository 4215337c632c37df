"""Pictures of three shapes: two processes come to the weights of one that accumulates, though their batches differ in
size and in rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.bucket_worker import CASES, trained, write_shaped_pairs, write_shapes
from tests.parity.launching import run_two_processes
from tests.preference_runs import config_of
from tests.runs import write_config


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    write_shapes(folder / "data")
    write_shaped_pairs(folder / "preference/pairs")
    config_of(folder / "preference", "glm_image")  # writes its file once, before the processes read it
    for mode in ("t2i", "i2i"):
        write_config(folder, mode)
    run_two_processes("bucket_worker.py", str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_two_chunks(two_processes: Path, case: str) -> None:
    ranks = [torch.load(two_processes / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = trained(two_processes, case, "training.gradient_accumulation_steps=2")
    assert [first + second for first, second in zip(*(rank["drawn"] for rank in ranks), strict=True)] == alone["drawn"]
    assert any(len(first) != len(second) for first, second in zip(*(rank["drawn"] for rank in ranks), strict=True))
    for half, weights in alone["weights"].items():  # type: ignore[attr-defined]
        for name in weights:
            assert torch.equal(ranks[0]["weights"][half][name], ranks[1]["weights"][half][name]), "ranks differ"
        differences = [(ranks[0]["weights"][half][name] - value).abs().max().item() for name, value in weights.items()]
        assert max(differences) <= 1e-5
        before = alone["before"][half]  # type: ignore[index]
        assert max((before[name] - value).abs().max().item() for name, value in weights.items()) > 1e-4
