"""The Slurm script and the SkyPilot file of `examples/cluster`, as far as they can be tried without a cluster: with
stand-ins for Slurm's commands and torchrun. `test_two_nodes.py` runs the recipe that both of them call."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples/cluster"

COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node-a; seq -f node-%g 20000; else echo "$@" >> "$TOLD/requeued"; fi',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scancel": '[ "$1" = --signal=TERM ] && kill -TERM "$(cat "$TOLD/pid")"',
    "torchrun": """
trap 'echo saved > "$TOLD/saved"; exit 143' TERM
printf "%s\\n" "$@" > "$TOLD/arguments"
echo $$ > "$TOLD/pid"
if [ -n "${ENDS_WITH:-}" ]; then exit "$ENDS_WITH"; fi
while :; do sleep 0.05; done""",
}


def submit(folder: Path, **changes: str) -> subprocess.Popen[str]:
    """The script, as Slurm starts it on the first node of a job."""
    for name, lines in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "TOLD": str(folder), **changes}
    environment |= {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    for name in ("HEAD", "PORT", "NODES", "WORKERS", "RESTARTS", "RUN_ID"):
        environment.pop(name, None)
    command = ["bash", str(CLUSTER / "slurm.sbatch"), "configs/quickstart.yaml", "training.max_steps=2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_when_its_time_is_up_a_job_saves_and_asks_for_another_turn(tmp_path) -> None:
    job = submit(tmp_path)
    while not (tmp_path / "pid").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert (tmp_path / "saved").exists() and (tmp_path / "requeued").read_text() == "requeue 1234567\n"
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-6:] == [
        "train.py",
        "--resume",
        "auto",
        "--config",
        "configs/quickstart.yaml",
        "training.max_steps=2",
    ]
    options = dict(zip(arguments[:-6:2], arguments[1:-6:2], strict=True))
    assert options["--rdzv-endpoint"] == "node-a:24567" and options["--nnodes"] == "2"
    assert options["--rdzv-id"] == "1234567" and options["--max-restarts"] == "3"


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_does_not_come_again(tmp_path, code) -> None:
    assert submit(tmp_path, ENDS_WITH=str(code)).wait(30) == code
    assert not (tmp_path / "requeued").exists()


def test_a_job_says_what_it_needs() -> None:
    done = subprocess.run(["bash", CLUSTER / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch" in done.stderr
    done = subprocess.run([CLUSTER / "torchrun.sh"], capture_output=True, text=True)
    assert done.returncode != 0 and "usage: HEAD=" in done.stderr


def test_rented_machines_run_the_same_recipe(tmp_path) -> None:
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    (tmp_path / "torchrun").write_text(f"#!/bin/bash\n{COMMANDS['torchrun']}\n")
    (tmp_path / "torchrun").chmod(0o755)
    given = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.7"}
    given |= {"SKYPILOT_TASK_ID": "sky-managed-1", "ENDS_WITH": "0", "TOLD": str(tmp_path)}
    environment = os.environ | task["envs"] | given | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {"OVERRIDES": "training.max_steps=2 seed=3"}
    subprocess.run(["bash", "-c", task["run"]], cwd=ROOT, env=environment, check=True)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-4:] == [task["envs"]["CONFIG"], "output_dir=/bucket/first", "training.max_steps=2", "seed=3"]
    assert arguments[arguments.index("--nproc-per-node") + 1] == "8"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "10.0.0.7:29500"
    assert any(place.startswith("/bucket") for place in task["file_mounts"])
