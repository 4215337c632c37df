"""Halves in shards that draw block by block: as whole ones do, whatever the other draws; all end where one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.parity.gather_worker import BROKEN
from tests.parity.launching import run_two_processes
from tests.runs import write_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gathering")
    write_config(folder)
    run_two_processes("gather_worker.py", str(folder))
    return folder


def figures(log: Path) -> list[dict[str, float]]:
    """What a run logged, but for how fast it was."""
    slow = ("time/", "images_per_second", "tokens_per_second")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith(slow)} for record in records]


@pytest.mark.parametrize("half", ["ar", "dit"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_draws_what_a_whole_model_does_and_holds_no_block_between_passes(runs, half, rank):
    found = torch.load(runs / f"drawn-{rank}.pt")[half]
    assert found["shards"].keys() == found["whole"].keys()
    for name, value in found["whole"].items():
        assert torch.equal(found["shards"][name], value), name
    blocks = found["after"]["whole blocks"]
    assert len(blocks) > 3 and not blocks.any()


@pytest.mark.parametrize("half", ["ar", "dit"])
@pytest.mark.parametrize("how", BROKEN)
def test_all_end_where_one_breaks_off_and_can_draw_again(runs, half, how):
    breaks, block = BROKEN[how]
    for rank in (0, 1):
        found = torch.load(runs / f"drawn-{rank}.pt")[half]
        if rank == breaks or block is not None:
            assert found[how] == {"gave up": torch.tensor(rank == breaks), "whole blocks": torch.tensor(0)}
        else:  # a check waits for those that make passes and have none, to their end
            assert all(torch.equal(found[how][name], value) for name, value in found["whole"].items())
        assert all(torch.equal(found["again"][name], value) for name, value in found["whole"].items())


def test_a_run_is_the_same_to_the_bit(runs):
    for rank in (0, 1):
        half, block = (torch.load(runs / f"{name}-{rank}.pt") for name in ("half", "block"))
        for part, weights in half["weights"].items():
            assert all(torch.equal(value, block["weights"][part][name]) for name, value in weights.items())
        told = [note for note in block["notes"] if note.startswith("while ")]
        assert told == [
            f"while {part} draws its shards are gathered block by block: as distributed.gather says"
            for part in ("ar", "dit")
        ]
        assert any(note.startswith("while ar draws its shards are gathered whole, 0.0") for note in half["notes"])
    scores, others = (figures(runs / name / "metrics.jsonl") for name in ("half", "block"))
    assert scores == others
    assert len({record["eval/total"] for record in scores if "eval/total" in record}) == 3  # of steps 0, 1 and 2
