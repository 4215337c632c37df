"""The command as a whole: it trains, says what it found in 80 columns or JSON, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from glm_training.cli import doctor as command
from glm_training.cli import main
from glm_training.doctor import examination, trial
from glm_training.doctor.commands import Asked
from glm_training.doctor.findings import Finding, failed, ok
from glm_training.doctor.processes import Ended, environment, run_together
from tests.runs import write_config
from tests.warm import Program
from tests.warm import run as warm_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a trial are forks that have their libraries; one alone is started as ever."""
    assert warm_run("-c", "").returncode == 0  # the server of forks has its files where tests have theirs

    def together(
        command: Sequence[str], changes: Sequence[Mapping[str, str]], limit: float, folder: Path
    ) -> list[Ended]:
        if len(changes) == 1:
            return run_together(command, changes, limit, folder)
        assert command[:2] == [sys.executable, "-P"]
        both = [Program(*command[2:], changes=environment(own), directory=folder) for own in changes]
        ended = [each.ended(limit) for each in both]
        return [Ended(each.returncode, each.stderr.splitlines()) for each in ended]

    monkeypatch.setattr(trial, "run_together", together)


def test_the_whole_of_it_on_this_machine_leaves_nothing_behind(warm, monkeypatch, tmp_path, capsys) -> None:
    places = {name: tmp_path / name for name in ("home", "temporary", "work")}
    for place in places.values():
        place.mkdir()
    changes = {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "CUDA_VISIBLE_DEVICES": ""}
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)  # to be found anew
    monkeypatch.chdir(places["work"])
    code = run(monkeypatch, "--json", "--time-limit", "900")
    told = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in told["findings"]}
    assert code == 0 and told["ok"] is True, told
    assert found["training step"]["facts"]["seconds"] > 0 and found["two processes"]["status"] == "ok"
    assert {"libraries", "GPU", "OCR", "metrics", "disk for runs", "disk for weights"} <= found.keys()
    assert [path for place in places.values() for path in place.rglob("*")] == []


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["glm-train", "doctor", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    code: int = stop.value.code  # type: ignore[assignment]
    return code


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Asked, dict[str, object]]]:
    """What is asked; two things are found, one of them a fault where a configuration is named."""
    asked: list[tuple[Asked, dict[str, object]]] = []

    def examine(given: Asked, config: object, **options: object) -> list[Finding]:
        asked.append((given, options))
        bad = failed("disk", "it is full", ["export", "TMPDIR=/big"])
        return [ok("GPU", "one"), *([bad] if config is not None else [])]

    monkeypatch.setattr(examination, "examine", examine)
    return asked


def test_exit_codes_and_what_is_asked(machine, monkeypatch, tmp_path, capsys) -> None:
    config = str(write_config(tmp_path))
    assert run(monkeypatch) == 0
    assert machine[0] == (Asked(), {"limit": command.LIMIT, "quick": False})
    assert "everything is here" in capsys.readouterr().out
    assert run(monkeypatch, config, "seed=4", "--mode", "t2i", "--quick", "--time-limit", "9") == 1
    assert machine[1] == (Asked((config,), ("seed=4",), "t2i"), {"limit": 9.0, "quick": True})
    told = capsys.readouterr().out
    assert "FAIL  disk: it is full\n      $ export TMPDIR=/big\n1 to mend" in told
    assert run(monkeypatch, config, "sede=4") == 2 and "sede" in capsys.readouterr().err
    assert run(monkeypatch, "seed=4") == 2 and "no configuration" in capsys.readouterr().err


def test_json_is_one_object(machine, monkeypatch, tmp_path, capsys) -> None:
    assert run(monkeypatch, "--json", str(write_config(tmp_path))) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and [each["status"] for each in told["findings"]] == ["ok", "failed"]
    assert told["findings"][1]["command"] == "export TMPDIR=/big" and told["findings"][0]["command"] is None


def test_the_old_script_is_the_same_command(machine, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["test_installation.py", "--quick"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 0 and machine[0][1]["quick"] is True
    text = (ROOT / "test_installation.py").read_text()
    assert re.search(r"from glm_training\.cli\.doctor import main", text)


def test_a_crash_is_the_libraries_fault_where_they_are_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = failed("OCR", "ImportError: x", ["pip"], crashed=True)
    other = failed("disk", "full", ["export"])
    monkeypatch.setattr(examination, "look", lambda checks, asked, limit: [crash, other])
    monkeypatch.setattr(examination, "installed", lambda: [failed("diffusers", "0.30.0", ["pip"])])
    found = {each.name: each for each in examination.examine(Asked(), None, limit=1, quick=True)}
    assert (found["OCR"].status, found["OCR"].command) == ("skipped", ()) and found["disk"] == other
    monkeypatch.setattr(examination, "installed", lambda: [])
    found = {each.name: each for each in examination.examine(Asked(), None, limit=1, quick=True)}
    assert found["OCR"] == crash


def test_a_trial_that_fails_says_what_the_run_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "CONFIG", trial.CONFIG + "sede: 4\n")
    found = trial.step(Asked(), 600)
    assert found.status == "failed" and "sede" in found.message and "--force-reinstall" in found.command


def test_two_processes_that_cannot_meet_are_told_which_variable_is_at_fault(warm, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    found = trial.two(Asked(), 600, gpus=0)
    assert found.status == "failed" and found.command == ("unset", "GLOO_SOCKET_IFNAME")
    assert "nowhere0" in found.message
