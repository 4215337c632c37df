"""Each start and resume of a run leaves a line that says where, with what, and how far it goes."""

from __future__ import annotations

import json
from importlib.metadata import version

from glm_training.engine.sessions import record_session
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]


def test_a_run_and_its_resume_have_a_line_each(tmp_path):
    trainer_of(tmp_path).train()
    trainer_of(tmp_path, "checkpoint.resume_from=latest", "training.max_steps=3").train()
    first, second = lines(tmp_path)
    assert (first["step"], first["total_steps"]) == (0, 2)
    assert (second["step"], second["total_steps"]) == (2, 3)
    assert first["packages"]["torch"] == version("torch") and first["processes"] == 1 and first["device"] == "cpu"


def test_sessions_of_a_discarded_stretch_move_aside_and_secrets_stay_out(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", "x y.yaml", "--api-key", "abc123secret"])
    for step in (None, 4, 2):
        record_session(config, World(), step, 9)
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [0, 2]
    assert "abc123secret" not in found[0]["command"] and "'x y.yaml'" in found[0]["command"]
    record_session(config, World(), None, 9)
    assert len(lines(tmp_path)) == 1
