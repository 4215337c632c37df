"""A stop signal outside the training loop: one line, the code that shells expect, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm_training.cli.stopping import stoppable
from tests.runs import write_config
from tests.warm import Program

pytestmark = pytest.mark.usefixtures("heeds_hangups")
ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]

STUCK = """
import sys
from glm_training.cli import stopping
stopping.GRACE_SECONDS = 0.2
def command():
    print("ready", flush=True)
    exec(sys.argv[1])
sys.exit(stopping.stoppable(command))
"""
ASLEEP = {
    "in Python": "import time; time.sleep(60)",
    "in a library": "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",  # minutes, heeds no signal
    "swallowed": """
import time
try:
    time.sleep(60)
except BaseException:
    time.sleep(60)
""",
    "turned into another error": """
import time
try:
    time.sleep(60)
except BaseException as error:
    raise ImportError("no numpy") from error
""",
}


def ended(process: subprocess.Popen, number: int) -> tuple[int, str]:
    try:
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, told


@pytest.mark.parametrize("where", ASLEEP)
@pytest.mark.parametrize("number", SIGNALS)
def test_a_stopped_command_says_so_in_a_line(number, where):
    command = [sys.executable, "-c", STUCK, ASLEEP[where]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    code, told = ended(process, number)
    assert code == 128 + number
    assert told == f"error: stopped by {number.name} before it was done\n"


HOLDING = """
import sys, time
from pathlib import Path
from glm_training.cli import stopping
from glm_training.utils.folder_lock import FolderLock

def command():
    FolderLock(Path(sys.argv[1])).acquire()
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            print("heard", flush=True)

stopping.GRACE_SECONDS = float(sys.argv[2])
sys.exit(stopping.stoppable(command))
"""


@pytest.mark.parametrize("grace, again", [(0.1, False), (60, True)], ids=["too long", "asked again"])
def test_a_run_that_does_not_unwind_leaves_no_folder_that_it_made(tmp_path, grace, again):
    command = [sys.executable, "-c", HOLDING, str(tmp_path / "runs" / "one"), str(grace)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert (tmp_path / "runs" / "one" / "run.lock").exists()
    process.send_signal(signal.SIGTERM)
    if again:
        assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_not_stopped_gives_its_code_and_errors_and_leaves_the_handlers():
    before = [signal.getsignal(number) for number in SIGNALS]
    assert stoppable(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        stoppable(lambda: 1 // 0)
    assert [signal.getsignal(number) for number in SIGNALS] == before and signal.set_wakeup_fd(-1) == -1


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stoppable(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7) == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_stopped_while_it_loads_leaves_nothing(tmp_path):
    program = Program("train.py", "--config", str(write_config(tmp_path)))
    program.until((tmp_path / "run" / "run.lock").exists)
    program.send_signal(signal.SIGTERM)
    done = program.ended()
    assert (done.returncode, done.stderr) == (143, "error: stopped by SIGTERM before it was done\n")
    assert not (tmp_path / "run").exists()
