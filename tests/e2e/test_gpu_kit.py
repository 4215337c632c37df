"""The script for machines with a GPU, run here on the CPU with tiny sizes; the long stages are left out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import kit
from benchmarks.gpu.stages import STAGES, Report, losses_of

ROOT = Path(__file__).parents[2]


def test_decoding_is_measured_in_a_process_of_its_own(tmp_path):
    asked = ["--device", "cpu", "--small", "--only", "decode", "--minutes", "20", "--patience", "4"]
    command = [sys.executable, "-m", "benchmarks.gpu.kit", "--out", str(tmp_path), *asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["decode"]["ended"] == "finished", summary
    found = json.loads((tmp_path / "decode.json").read_text())
    assert found["small"] and found["environment"]["device"] == "cpu" and found["floor"]["ms"] > 0
    for batch in (found["batch 1"], found["batch 2"]):
        assert batch["plain"]["ms_per_token"] > 0 and batch["stock"]["ms_per_token"] > 0, batch
        assert batch["plain"]["checksum"] == batch["graph"]["checksum"]
        assert batch["times_faster_than_stock"] > 0 and batch["times_the_floor"] > 0
    assert done.returncode == 0 and list(summary) == ["decode"]


def test_a_stage_over_its_time_is_ended(tmp_path):
    started = time.monotonic()
    end = kit.run_stage("losses", tmp_path / "losses.json", ["--device", "cpu", "--small"], 0.2)
    assert end["ended"] == "over its 0 s" and time.monotonic() - started < 60
    assert not list(tmp_path.glob("*.log"))


def test_a_stage_that_fails_says_why(tmp_path):
    end = kit.run_stage("decode", tmp_path / "decode.json", ["--odd"], 120)
    assert end["ended"] == "failed (2)" and "--odd" in end["error"]


def test_every_stage_has_a_limit_and_all_fit_into_the_time():
    assert list(STAGES) == list(kit.STAGES)
    assert sum(limit for name, limit in kit.STAGES.items() if name != "nf4") <= 9 * 60


def test_results_are_there_as_they_come(tmp_path):
    report = Report(tmp_path / "r.json")
    report.add(first=1)
    report.add(second={"third": 2})
    assert json.loads((tmp_path / "r.json").read_text()) == {"first": 1, "second": {"third": 2}}


def test_a_run_without_losses_is_no_agreement():
    assert losses_of([{"step": 1, "ar/loss": 2.0, "lr": 1.0}, {"step": 2, "ar/loss": 0.0}]) == {"1 ar/loss": 2.0}
    with pytest.raises(RuntimeError, match="no loss was logged"):
        losses_of([{"step": 1, "lr": 1.0}])
