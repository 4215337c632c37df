"""One process of two fails: both end, with the same error, after the last finished step is saved; nobody hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.checkpoint.resume import resolve_resume
from tests.parity.failing_worker import CASES
from tests.runs import write_config
from tests.warm import run_two

EXPECTED = {
    "data": ("DataLostError: images/7.png: does not exist", 1),
    "forward pass": ("NonFiniteError: supervised step: the velocity is NaN, in step 2", 1),
    "gradient": ("NonFiniteError: the gradient norm of the dit half is nan, in step 2", 1),
    "disk": ("TrainingError: the checkpoint of step 3 cannot be written to", None),
    "death": ("TrainingError: another process of this run has ended", 1),
}


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def strategy(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def told(strategy, tmp_path_factory) -> Path:
    """Every case of the worker, by two gloo processes."""
    folder = tmp_path_factory.mktemp("failing")
    write_config(folder)
    worker = str(Path(__file__).with_name("failing_worker.py"))
    done = run_two(worker, str(folder), f"distributed.strategy={strategy}")
    assert done[1].returncode == 9, done
    (folder / "stderr").write_text("".join(each.stderr for each in done))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_when_one_process_fails_both_end_with_the_same_error(told, strategy, case):
    words, step = EXPECTED[case]
    lost = strategy == "fsdp" and case == "death"
    texts = [path.read_text() for rank in (0, 1) if (path := told / f"{case}-{rank}.txt").is_file()]
    assert len(texts) == (1 if case == "death" else 2), (told / "stderr").read_text()
    assert texts[0].startswith(words) and len(set(texts)) == 1
    checkpoints = told / case.replace(" ", "_") / "checkpoints"
    if lost:  # with the dead one's shards
        assert "saving that step failed as well: the shards of the processes that have ended are lost" in texts[0]
    elif step is not None:
        assert resolve_resume(checkpoints, "latest").step == step
        assert "stopped after step 1 of 3 and nothing is lost" in texts[0]


def test_each_process_that_met_values_that_are_not_finite_leaves_what_it_had_in_hand(told):
    both, one = (told / case / "nonfinite" for case in ("gradient", "forward_pass"))
    assert [path.name for path in sorted(both.iterdir())] == [f"step-000002-process-{rank}.json" for rank in (0, 1)]
    assert [path.name for path in one.iterdir()] == ["step-000002-process-1.json"]
