"""One process of two in shards fails, is told to stop, or sees another disk: both end alike, and nobody hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.checkpoint.resume import load_checkpoint, resolve_resume
from tests.parity.sharded_failing_worker import CASES
from tests.runs import write_config
from tests.warm import run_two

STOPPED = "TrainResult(step={step}, before={{}}, after={{}}, stopped_by=15, halted=None)"
EXPECTED = {
    "full disk": ("TrainingError: the checkpoint of step 2 needs ", 3),
    "unseen": ("DistributedError: looking for the folder of checkpoints failed on rank 1: ", None),
    "lost": ("TrainingError: rank 1 does not see /proc/self/cwd/lost/.partial-step-000002/states/dit_weights", 1),
    "reward": ("ScoringError: Refusing.compute_reward raised RuntimeError: the judge has left", 1),
    "data": ("DataLostError: 1.png has gone", 1),
    "plans": ("UnforeseenError: RuntimeError: no plans", 1),
    "plans of an evaluation": ("UnforeseenError: RuntimeError: no plans", 1),
    "token": ("UnforeseenError: RuntimeError: no token", 1),
    "weights": (
        "TrainingError: looking for weights that are not finite failed on rank 1: NonFiniteError: after step 2",
        1,
    ),
    "SIGTERM in rollout": (STOPPED.format(step=1), 1),
    "SIGTERM in DiT update": (STOPPED.format(step=1), 1),
    "SIGTERM in evaluation": (STOPPED.format(step=1), 1),
    "SIGTERM in saving": (STOPPED.format(step=2), 2),
}
"""How both end, and the step of the newest checkpoint."""
PLACES = {"unseen": "node-0/unseen", "lost": "node-0/lost"}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """Every case of the worker, by two gloo processes."""
    folder = tmp_path_factory.mktemp("failing-shards")
    write_config(folder)
    worker = str(Path(__file__).with_name("sharded_failing_worker.py"))
    done = run_two(worker, str(folder), *EXPECTED, "aborted") + run_two(worker, str(folder), "gathering")
    (folder / "stderr").write_text("".join(each.stderr for each in done))
    return folder


@pytest.mark.parametrize("case", EXPECTED)
def test_both_end_alike(told, case):
    name, (words, step) = case.replace(" ", "_"), EXPECTED[case]
    texts = [path.read_text() for rank in (0, 1) if (path := told / f"{name}-{rank}.txt").is_file()]
    assert len(texts) == 2 and len(set(texts)) == 1, (told / "stderr").read_text()
    assert texts[0].startswith(words)
    checkpoints = told / PLACES.get(case, f"{name}/checkpoints")
    if step is not None:
        point = resolve_resume(checkpoints, "latest")
        assert point.step == step
        assert load_checkpoint(point.path)["dit_weights"]
        assert not list(checkpoints.glob(".partial-*"))


def test_a_full_disk_says_what_to_do_and_the_next_save_works(told):
    first, *rest = (told / "full_disk-1.txt").read_text().splitlines()
    assert "the previous checkpoint is untouched. Free some space, lower checkpoint.save_total_limit" in first
    assert rest[-1] == "TrainResult(step=3, before={}, after={}, stopped_by=None, halted=None)"
    names = sorted(path.name for path in (told / "full_disk/checkpoints").glob("step-*"))
    assert names == ["step-000001", "step-000002", "step-000003"]


ENDED = {
    "aborted": "Aborted: 130",
    "gathering": "DeviceMemoryError: the device cpu is out of memory. Phase: saving, after 2 finished steps.",
}
"""What process 1 says that ends, where the other waits for its shards."""


@pytest.mark.parametrize("case", ENDED)
def test_where_one_ends_in_a_save_the_other_says_so(told, case):
    assert set(CASES) == {*EXPECTED, *ENDED}
    own, other = ((told / f"{case}-{rank}.txt").read_text() for rank in (1, 0))
    assert own.startswith(ENDED[case])
    assert other.startswith("TrainingError: another process of this run has ended, so this one (rank 0) stops as well")
    assert "Traceback" not in (told / "stderr").read_text()
    assert resolve_resume(told / case / "checkpoints", "latest").step == 1
    assert not list((told / case / "checkpoints").glob(".partial-*"))
