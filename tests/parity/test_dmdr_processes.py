"""DMDR on two and three processes comes to the weights of one with all their prompts: exchanged gradients, the same
draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.dmdr_runs import config_of, random_scorers, stepped, trainer_of
from tests.parity.dmdr_worker import SHARED
from tests.parity.launching import run_processes
from tests.runs import weights_of

REWARDED = ["dmdr.reward.decoder=vae", "dmdr.dynamic_steps=4"]


@pytest.fixture(scope="module", params=[("ddp", 3), ("fsdp", 2)], ids=["ddp", "fsdp"])
def processes(request, tmp_path_factory) -> tuple[Path, list[str], int]:
    """Three of two prompts each go over the four that there are one and a half times."""
    strategy, count = request.param
    folder = tmp_path_factory.mktemp("dmdr")
    keys = [*random_scorers(folder / "scorers"), *REWARDED]
    for family in ("sdxl", "glm_image"):
        config_of(folder, family=family)
    run_processes(count, "dmdr_worker.py", str(folder), f"distributed.strategy={strategy}", *keys)
    return folder, keys, count


@pytest.mark.parametrize("family", ["sdxl", "glm_image"])
def test_processes_equal_one_with_all_their_prompts(processes, family):
    folder, keys, count = processes
    ranks = [torch.load(folder / f"{family}-{rank}.pt", weights_only=True) for rank in range(count)]
    trainer = trainer_of(folder, *SHARED, *keys, f"training.batch_size={2 * count}", family=family)
    before = weights_of(trainer)
    alone = stepped(trainer)
    for part, weights in alone.items():
        moved = max((before[part][name] - value).abs().max().item() for name, value in weights.items())
        assert moved > 1e-5, "no learning"
        for name, value in weights.items():
            assert all(torch.equal(ranks[0][part][name], other[part][name]) for other in ranks), "ranks differ"
            torch.testing.assert_close(ranks[0][part][name], value, rtol=0, atol=max(1e-6, 0.01 * moved))
