"""Checks that hang, crash or raise are findings, the others go on, and nothing stays behind."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import pytest

from glm_training.cli.doctor import add_doctor_arguments
from glm_training.doctor.commands import Asked
from glm_training.doctor.processes import LONGEST, look, module, run_together, slow


@pytest.fixture
def fake_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What stands in for torch in processes that are started here."""

    def write(code: str) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")

    return write


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def test_a_library_that_hangs_is_stopped_and_said_to_hang(fake_torch, tmp_path: Path) -> None:
    fake_torch(f"""
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
with open({str(tmp_path / "pids")!r}, "a") as file:
    file.write(f"{{os.getpid()}} {{child.pid}} ")
time.sleep(600)
""")
    begun = time.monotonic()
    found = list(look(["GPU", "OCR"], Asked(), limit=5))
    assert time.monotonic() - begun < 60
    assert [(each.name, each.status) for each in found] == [("GPU", "failed"), ("OCR", "failed")]
    assert "stopped after 5 s" in found[0].message and found[0].command[-2:] == ("--time-limit", "20")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4 and not any(map(alive, pids))


@pytest.mark.parametrize(("limit", "longer"), [(300, "1200"), (21_600.5, "86400"), (86_399, "86400")])
def test_the_longer_limit_is_one_that_doctor_takes(limit: float, longer: str) -> None:
    command = slow("GPU", limit, Asked()).command
    assert command[-2:] == ("--time-limit", longer)
    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    assert parser.parse_args(command[-2:]).time_limit == float(longer)


def test_what_takes_longer_than_doctor_can_wait_is_not_asked_for_again() -> None:
    found = slow("GPU", LONGEST, Asked())
    assert "--time-limit" not in found.command and "--force-reinstall" in found.command


def test_a_library_that_crashes_its_process_is_told(fake_torch) -> None:
    fake_torch("import os, sys\nprint('no such instruction', file=sys.stderr, flush=True)\nos.abort()\n")
    found = list(look(["GPU", "OCR"], Asked(), limit=60))
    assert [each.name for each in found] == ["GPU", "OCR"]
    assert all(each.facts["crashed"] and "code -6: no such instruction" in each.message for each in found)


def test_a_library_that_does_not_import_is_told_and_the_process_goes_on(fake_torch) -> None:
    fake_torch("import os\nprint('noise of a library')\nraise ImportError(f'libcudart is lacking {os.getpid()}')\n")
    found = list(look(["GPU", "OCR"], Asked(), limit=60))
    assert [each.status for each in found] == ["failed", "failed"]
    assert found[0].message.startswith("ImportError: libcudart is lacking")
    assert found[0].message == found[1].message  # the same process
    assert found[0].command[1:5] == ("-m", "pip", "install", "--force-reinstall")


def test_of_a_library_that_wraps_what_it_could_not_import_the_cause_is_told(fake_torch) -> None:
    fake_torch(
        "try:\n    raise ValueError('operator torchvision::nms does not exist')\n"
        "except ValueError as error:\n    raise RuntimeError('Failed to import x (look up):') from error\n"
    )
    (found,) = look(["GPU"], Asked(), limit=60)
    assert found.message == "ValueError: operator torchvision::nms does not exist"


def test_what_does_not_end_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import os, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
        "print(os.environ['NAME'], file=__import__('sys').stderr, flush=True)\n"
        "open(os.environ['NAME'], 'w').write(f'{os.getpid()} {child.pid}')\ntime.sleep(600)\n"
    )
    command = [module("x")[0], str(tmp_path / "slow.py")]
    ended = run_together(command, [{"NAME": "a"}, {"NAME": "b"}], 3, tmp_path)
    assert [each.code for each in ended] == [None, None] and [each.told for each in ended] == [["a"], ["b"]]
    pids = [int(pid) for name in "ab" for pid in (tmp_path / name).read_text().split()]
    assert len(pids) == 4 and not any(map(alive, pids))


def test_a_launchers_variables_do_not_reach_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "tell.py").write_text(
        "import os, sys\nprint([n for n in os.environ if n in ('SLURM_NTASKS', 'WORLD_SIZE')], file=sys.stderr)\n"
    )
    (ended,) = run_together([module("x")[0], str(tmp_path / "tell.py")], [{}], 60, tmp_path)
    assert ended.code == 0 and ended.told == ["[]"]
