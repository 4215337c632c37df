"""Every run ends with its page, in whatever way it ends; a page that fails ends no run."""

from __future__ import annotations

import json
import sys

import pytest

from glm_training.cli import main as cli
from glm_training.engine.errors import TrainingError
from glm_training.reinforcement import updates
from glm_training.trainers import run as runner
from glm_training.utils.distributed import World
from tests.report_runs import write_run
from tests.runs import config_of


def test_a_run_ends_with_its_page(tmp_path, capsys):
    config = config_of(
        tmp_path,
        "evaluation.enabled=true",
        "logging.log_images=true",
        "logging.eval_interval=1",
        "training.max_steps=1",
    )
    runner.run_training(config)
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"report: {tmp_path}/run/report.html" in capsys.readouterr().out
    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert f"{logged['reward/total']:.7g}" in html
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert [each["step"] for each in data["rollouts"][0]["steps"]] == [1]
    assert [each["step"] for each in data["samples"][0]["steps"]] == [0, 1]
    assert "finished" in html


def test_a_run_that_fails_has_a_page_too(tmp_path, monkeypatch):
    update = updates.update_ar

    def breaks(learning, *rest):
        if learning.step == 1:
            raise TrainingError("a fault in step 2")
        return update(learning, *rest)

    monkeypatch.setattr(updates, "update_ar", breaks)
    with pytest.raises(TrainingError, match="a fault in step 2"):
        runner.run_training(config_of(tmp_path))
    assert "stopped" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_page_that_fails_ends_no_run_and_says_how_to_make_it(tmp_path, monkeypatch, caplog):
    def breaks(*_):
        raise KeyError("a fault of the page")

    monkeypatch.setattr(runner, "page", breaks)
    assert runner.run_training(config_of(tmp_path, "training.max_steps=1")).step == 1
    told = [record.getMessage() for record in caplog.records if "report.html" in record.getMessage()]
    assert told and f"`glm-train report {tmp_path}/run` makes it" in told[0]


def test_another_process_writes_no_page(tmp_path):
    config = config_of(tmp_path)
    write_run(tmp_path / "run", {1: {"total": [0.5]}})
    runner.write_report(config, World(rank=1, world_size=2))
    assert not (tmp_path / "run" / "report.html").exists()
    runner.write_report(config, World(rank=0, world_size=2))
    assert (tmp_path / "run" / "report.html").exists()


def command(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["glm-train", "report", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_says_the_verdict_first_and_writes_the_page(tmp_path, monkeypatch, capsys):
    one = write_run(tmp_path / "a", {1: {"total": [0.1, 0.2, 0.3]}})
    two = write_run(tmp_path / "b", {1: {"total": [0.2, 0.31, 0.4]}})
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, str(one), str(two)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("b is better than a: reward 0.303 against 0.200, +0.103 (95 % interval ")
    assert lines[-1] == "page: comparison.html"
    html = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert lines[0] in html
    assert command(monkeypatch, str(one)) == 0
    assert (one / "report.html").is_file()


def test_the_command_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    one = write_run(tmp_path / "a", {1: {"total": [0.1, 0.2, 0.3]}})
    (one / "report.html").write_text("mine")
    assert command(monkeypatch, str(one)) == 2
    assert "--out" in capsys.readouterr().err and (one / "report.html").read_text() == "mine"
    assert command(monkeypatch, str(tmp_path / "none"), str(tmp_path / "nor")) == 2
    assert capsys.readouterr().err.count("is no folder") == 2
