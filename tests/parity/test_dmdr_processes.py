"""DMDR on two processes comes to the weights of one with the double batch: exchanged gradients, the same draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dmdr_runs import config_of, random_scorers, stepped, trainer_of
from tests.parity.dmdr_worker import SHARED
from tests.parity.launching import run_two_processes
from tests.runs import weights_of

REWARDED = ["dmdr.reward.decoder=vae", "dmdr.dynamic_steps=4"]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("dmdr")
    keys = [*random_scorers(folder / "scorers"), *REWARDED]
    for family in ("sdxl", "glm_image"):
        config_of(folder, family=family)
    run_two_processes("dmdr_worker.py", str(folder), f"distributed.strategy={request.param}", *keys)
    return folder, keys


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_two_processes_equal_one_with_the_double_batch(two_processes, family):
    folder, keys = two_processes
    ranks = [torch.load(folder / f"{family}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    trainer = trainer_of(folder, *SHARED, *keys, "training.batch_size=4", family=family)
    before = weights_of(trainer)
    alone = stepped(trainer)
    for part, weights in alone.items():
        moved = max((before[part][name] - value).abs().max().item() for name, value in weights.items())
        assert moved > 1e-5, "no learning"
        for name, value in weights.items():
            assert torch.equal(ranks[0][part][name], ranks[1][part][name]), "ranks differ"
            torch.testing.assert_close(ranks[0][part][name], value, rtol=0, atol=max(1e-6, 0.01 * moved))
