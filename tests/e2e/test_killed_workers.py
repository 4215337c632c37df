"""`kill -9` of a worker in the rollout, in the save, and in the update when weights have changed: torchrun's agent
starts both again, and the run ends with the weights of one that nobody disturbed.

Here the agent runs in one process with its workers' libraries, and the deaths come one after the other. Each alone,
under torchrun itself and on two nodes, with restarts and without: `python -m benchmarks.kill`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.kill import LIMIT_SECONDS, weights
from tests.runs import write_config
from tests.warm import Program

LAUNCHER = str(Path(__file__).with_name("elastic_launcher.py"))
DEATHS = {
    "ddp": ("rollout:0:2", "save:0:2", "update:1:3", "save:1:4"),
    "fsdp": ("rollout:1:2", "update:0:3", "save:1:4"),
}
RUN = ("training.batch_size=1", "training.max_steps=4", "logging.save_interval=2", "training.learning_rate=1e-3")


def launch(folder: Path, strategy: str, deaths: tuple[str, ...]) -> Program:
    folder.mkdir()
    words = ["--config", str(write_config(folder)), "--resume", "auto", *RUN, f"distributed.strategy={strategy}"]
    return Program(LAUNCHER, str(len(deaths)), str(folder), *deaths, "--", *words)


@pytest.fixture(scope="module", params=DEATHS)
def strategy(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def told(strategy, tmp_path_factory) -> tuple[Path, str]:
    """The folder of both runs, and what the disturbed one said on standard error."""
    folder = tmp_path_factory.mktemp("killed")
    pair = [launch(folder / "undisturbed", strategy, ()), launch(folder / "killed", strategy, DEATHS[strategy])]
    done = [program.ended() for program in pair]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder, done[1].stderr


def test_the_weights_are_those_of_an_undisturbed_run(told) -> None:
    folder, _ = told
    assert weights(folder / "killed") == weights(folder / "undisturbed")
    assert weights(folder / "killed")["step"] == "step-000004"
    lines = [(folder / run / "run/metrics.jsonl").read_text().splitlines() for run in ("undisturbed", "killed")]
    steps = [[json.loads(line)["step"] for line in each] for each in lines]
    assert steps[0] == steps[1] == [1, 2, 3, 4]


def test_each_death_ends_an_attempt_and_both_start_again_soon(told, strategy) -> None:
    """The agent names one worker an attempt: the one that was killed, or, when it looks too late, the other, which
    has ended because of it."""
    folder, stderr = told
    arranged = DEATHS[strategy]
    deaths = [json.loads((folder / f"killed/death-{number}").read_text()) for number in range(len(arranged))]
    named = re.findall(r"failed \(exitcode: (-?\d+)\) local_rank: (\d) \(pid: (\d+)\)", stderr)
    assert len(named) == len(arranged), stderr
    for (code, rank, pid), arrangement, death in zip(named, arranged, deaths, strict=True):
        killed = arrangement.split(":")[1]
        assert (code, rank, pid) == ("-9", killed, str(death["pid"])) or (code, rank) == ("1", str(1 - int(killed)))
    starts = sorted(float(path.read_text()) for path in (folder / "killed").glob("start-*"))
    assert len(starts) == 2 * (len(arranged) + 1)
    for number, death in enumerate(deaths, start=1):
        assert 0 < starts[2 * number] - death["time"] < LIMIT_SECONDS


def test_whoever_is_left_says_what_it_knows(told, strategy) -> None:
    """Rank 1 does not hear whether step 1 was saved, and rank 0 cannot save half of step 3, nor step 1 without the
    shards of rank 1."""
    folder, stderr = told
    lines = [line for line in stderr.splitlines() if line.startswith(("The run stopped", "Step "))]
    mended, place = "once the cause is mended,", f"--resume continues from {folder}/killed/run/checkpoints"
    heard = {
        "ddp": [
            f"The run stopped after step 1 of 4; rank 0 saves that step, unless it is what has ended: {mended} {place}",
            f"Step 3 of 4 was not finished, and had changed weights: {mended} {place}/step-000002",
        ],
        "fsdp": [
            "The run stopped after step 1 of 4, and saving that step failed as well: the shards of the processes that "
            f"have ended are lost with them: {mended} no checkpoint was saved",
            f"Step 3 of 4 was not finished: {mended} {place}/step-000002",
        ],
    }
    assert lines == heard[strategy]
    assert stderr.count("another process of this run has ended") == len(DEATHS[strategy])
