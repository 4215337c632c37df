"""The script for machines with a GPU, run here on the CPU with tiny sizes; the steps of GRPO are left out."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kit
from benchmarks.gpu.stages import STAGES, Report, losses_of
from tests import warm


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each stage wrote, by stage, each in a process of its own: after the first in forks that have libraries."""
    folder = tmp_path_factory.mktemp("gpu")
    asked = ["--device", "cpu", "--small", "--only", "tests,losses,decode", "--minutes", "20", "--patience", "4"]
    started = kit.run_stage

    def stage(name: str, place: Path, options: list[str], limit: float) -> dict[str, Any]:
        if name == "tests":
            return started(name, place, options, limit)
        done = warm.run("-m", "benchmarks.gpu.stages", name, "--out", str(place), *options)
        return {"ended": done.stderr if done.returncode else "finished"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kit", "--out", str(folder), *asked])
        patch.setattr(kit, "run_stage", stage)
        code = kit.main()
    summary = json.loads((folder / "summary.json").read_text())
    assert [end["ended"] for end in summary.values()] == ["finished"] * 3, summary
    assert code == 0 and list(summary) == ["tests", "losses", "decode"]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in summary}


def test_the_tests_on_the_device_are_counted(results):
    assert results["tests"]["counts"]["passed"] > 50 and not results["tests"]["red"]


def test_the_losses_are_held_against_those_of_the_cpu_in_fp32(results):
    found = results["losses"]
    assert found["compared"]["no"]["losses"] == found["cpu_fp32"] and found["compared"]["no"]["largest"] == 0
    assert 1e-6 < found["compared"]["bf16"]["largest"] <= found["compared"]["bf16"]["bound"] and found["over"] == []


def test_decoding_is_measured_on_both_sides(results):
    found = results["decode"]
    assert found["small"] and found["environment"]["device"] == "cpu" and found["floor"]["ms"] > 0
    for batch in (found["batch 1"], found["batch 2"]):
        assert batch["plain"]["ms_per_token"] > 0 and batch["stock"]["ms_per_token"] > 0, batch
        assert batch["plain"]["checksum"] == batch["graph"]["checksum"]
        assert batch["times_faster_than_stock"] > 0 and batch["times_the_floor"] > 0


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
