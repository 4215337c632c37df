"""Training against a reward service that fails: the run retries, stops with a checkpoint, and resumes to the end."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.cli import training
from glm_training.engine.errors import ScoringError
from tests.reward_service import FaultyService, RawService
from tests.runs import trainer_of, write_config
from tests.same import assert_identical
from tests.warm import free_port, run_two

ROOT = Path(__file__).parents[2]
SHARED = [
    "model.component=dit",
    "training.max_steps=2",
    "training.batch_size=1",
    "reward.grpo.num_samples=2",
    "reward.grpo.gate=false",
    "logging.save_interval=100",
    "reward.metrics={remote/judge: 1.0}",
]


def options(url: str, **more: object) -> list[str]:
    settings = {"url": url, "retries": 2, "backoff_seconds": 0.02, "timeout_seconds": 0.4, **more}
    return [*SHARED, *(f"reward.options.remote.judge.{name}={value}" for name, value in settings.items())]


def end_of(folder: Path) -> dict[str, object]:
    return load_checkpoint(folder / "run" / "checkpoints" / "step-000002")


@pytest.fixture(scope="module")
def service():
    with FaultyService() as service:
        yield service


@pytest.fixture(scope="module")
def undisturbed(service, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    trainer_of(folder, *options(service.url)).train()
    return end_of(folder)


def test_passing_faults_change_nothing(tmp_path, service, undisturbed):
    service.faults = ["500", "malformed", "fine", "slow"]
    trainer_of(tmp_path, *options(service.url)).train()
    assert service.faults == []
    assert_identical(end_of(tmp_path), undisturbed)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("500", "HTTP 500: out of memory"),
        ("slow", "nothing within 0.4 s"),
        ("malformed", "Invalid JSON"),
        ("too few", "1 scores for 2 samples"),
        ("nan", "finite number"),
        ("400", "HTTP 400: bad sample"),
    ],
)
def test_a_lasting_fault_stops_the_run_where_it_can_resume(tmp_path, service, undisturbed, fault, cause):
    service.faults, service.always = ["fine"], fault
    with pytest.raises(ScoringError) as caught:
        trainer_of(tmp_path, *options(service.url)).train()
    message = str(caught.value)
    assert cause in message and "reward.options.remote.judge" in message
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    assert (
        f"stopped after step 1 of 2 and nothing is lost: once the cause is mended, --resume continues from {saved}"
        in (message)
    )
    service.faults, service.always = [], "fine"
    if fault in ("slow", "nan"):  # one that is retried at once, and one that keeps a connection waiting
        # a longer wait is what the message recommends, so it is no other run
        trainer_of(tmp_path, *options(service.url, timeout_seconds=5), "checkpoint.resume_from=latest").train()
        assert_identical(end_of(tmp_path), undisturbed)


def test_a_fault_in_the_first_evaluation(tmp_path, service):
    service.faults, service.always = [], "500"
    shared = [*options(service.url), "training.max_steps=1", "evaluation.enabled=true", "evaluation.num_eval_samples=1"]
    with pytest.raises(ScoringError, match="step 0 of 1.*step-000000"):
        trainer_of(tmp_path, *shared).train()
    service.always = "fine"
    result = trainer_of(tmp_path, *shared, "checkpoint.resume_from=latest").train()
    assert result.step == 1 and result.before and result.after


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.gradient_accumulation_steps=1"],
        ["training.gradient_accumulation_steps=2"],  # scored beside the drawing, in a thread
        ["training.use_reward=false", "evaluation.enabled=true", "evaluation.num_eval_samples=1"],
    ],
    ids=["in a step", "beside a step", "in an evaluation"],
)
def test_a_server_that_hangs_holds_up_no_stop(tmp_path, overrides):
    killed: list[float] = []

    def answer(service: RawService, connection: socket.socket) -> None:
        killed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        service.over.wait(30)

    with RawService(answer) as service:
        settings = options(service.url, timeout_seconds=60, retries=3)
        trainer = trainer_of(tmp_path, *settings, *overrides)
        result = trainer.train()
    assert result.stopped_by == signal.SIGTERM and result.step == 0
    assert time.monotonic() - killed[0] < 5
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-000000"
    ours = [thread for thread in threading.enumerate() if thread.name in ("scoring", "reward-request")]
    assert all(thread.daemon for thread in ours), "the interpreter would wait for it"


WORKER = """
import sys
from pathlib import Path
from glm_training.rewards import RewardServiceError
from glm_training.engine.errors import ScoringError
from glm_training.utils.distributed import init_world, shutdown
from tests.runs import trainer_of

world = init_world(True, "gloo")
trainer = trainer_of(Path(sys.argv[1]), *sys.argv[2:], world=world)
score = trainer.calculator.compute_rewards

def failing(batch):
    if world.rank == 1 and trainer.step == 1:
        raise RewardServiceError("the judge is gone")
    return score(batch)

trainer.calculator.compute_rewards = failing
try:
    trainer.train()
except ScoringError as error:
    (Path(sys.argv[1]) / f"told-{world.rank}").write_text(str(error))
shutdown(world)
"""


def test_when_one_process_fails_all_stop_together(tmp_path):
    write_config(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    overrides = [*SHARED[:-1], "distributed.enabled=true"]
    for done in run_two(str(tmp_path / "worker.py"), str(tmp_path), *overrides):
        assert done.returncode == 0, done.stderr
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("the judge is gone\nThe run stopped after step 1 of 2")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step-000001"


def train(*arguments: str) -> int:
    """The exit code of train.py."""
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return training.run(parser.parse_intermixed_args(arguments))


def serve(port: int) -> subprocess.Popen[bytes]:
    """examples/reward_server.py, listening."""
    command = [sys.executable, "examples/reward_server.py", "examples/compressibility_reward.py:Compressibility"]
    server = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert server.stdout is not None and b"http://127.0.0.1" in server.stdout.readline()
    return server


def kill(server: subprocess.Popen[bytes]) -> None:
    os.kill(server.pid, signal.SIGKILL)
    server.communicate()


def test_the_reference_server_killed_in_the_middle(tmp_path, capsys):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["--config", str(write_config(tmp_path)), *options(url, timeout_seconds=20)]
    assert train(*arguments) == 2
    assert "Start the server, or set reward.options.remote.judge.url" in " ".join(capsys.readouterr().err.split())
    server = serve(port)
    try:
        assert httpx2.get(f"{url}/health", trust_env=False).is_success
        trainer = trainer_of(tmp_path, *options(url, timeout_seconds=20))
        real = trainer.training_step

        def step() -> dict[str, float]:
            if trainer.step == 1:
                kill(server)
            return real()

        trainer.training_step = step
        with pytest.raises(ScoringError, match="ConnectError.*(?s:.*)--resume continues"):
            trainer.train()
    finally:
        kill(server) if server.poll() is None else None
    assert train(*arguments, "--resume") == 2, "still gone: said before the model is loaded"
    server = serve(port)
    try:
        assert train(*arguments, "--resume") == 0
        whole = [*options(url, timeout_seconds=20), f"output_dir={tmp_path}/whole"]
        trainer_of(tmp_path, *whole).train()
    finally:
        kill(server)
    assert_identical(end_of(tmp_path), load_checkpoint(tmp_path / "whole" / "checkpoints" / "step-000002"))
