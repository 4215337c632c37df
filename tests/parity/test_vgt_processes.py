"""VGT's trainings on two processes come to the weights of one with the double batch: exchanged gradients and logits of
the discriminator, the same draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.launching import run_two_processes
from tests.parity.vgt_worker import OWN, SHARED
from tests.runs import weights_of
from tests.vgt_runs import config_of, stepped, trainer_of


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two_processes(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vgt")
    for component in OWN:
        config_of(folder, component=component)
    run_two_processes("vgt_worker.py", str(folder), f"distributed.strategy={request.param}")
    return folder


@pytest.mark.parametrize("component", list(OWN))
def test_two_processes_equal_one_with_the_double_batch(two_processes, component):
    ranks = [torch.load(two_processes / f"{component}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    trainer = trainer_of(two_processes, *SHARED, *OWN[component], "training.batch_size=4", component=component)
    before = weights_of(trainer)
    alone = stepped(trainer)
    for part, weights in alone.items():
        moved = max((before[part][name] - value).abs().max().item() for name, value in weights.items())
        assert moved > 1e-5, "no learning"
        for name, value in weights.items():
            assert torch.equal(ranks[0][0][part][name], ranks[1][0][part][name]), "ranks differ"
            torch.testing.assert_close(ranks[0][0][part][name], value, rtol=0, atol=max(1e-6, 0.01 * moved))
    for name, values in trainer.judge().items():
        assert torch.equal(ranks[0][1][name], ranks[1][1][name])
        torch.testing.assert_close(ranks[0][1][name], values, rtol=1e-3, atol=1e-3)
    if component == "autoencoder":  # averages of the logits, which LeCam's penalty looks at
        assert torch.equal(ranks[0][2], ranks[1][2])
        assert ranks[0][2].abs().min() > 0
        torch.testing.assert_close(ranks[0][2], trainer.averages, rtol=1e-4, atol=1e-7)
