"""Reading a run's folder: as it is, half written, moved, or none at all."""

from __future__ import annotations

import json
import shutil

import pytest

from glm_training.report.run import ReportError, flattened, read_run, read_runs
from glm_training.utils.folder_lock import FolderLock
from tests.report_runs import write_lines, write_run


def test_figures_are_those_of_the_log(tmp_path):
    lines = [
        {"step": 1, "reward/total": 0.25, "time/step_seconds": 2.0},
        {"step": 1, "eval/total": 0.5},
        {"step": 2, "reward/total": None, "nonfinite": ["reward/total"], "time/step_seconds": 2.5},
    ]
    run = read_run(write_run(tmp_path / "a", figures=lines))
    assert run.figures["reward/total"].steps == [1, 2]
    assert run.figures["reward/total"].values == [0.25, None]
    assert run.figures["reward/total"].last() == 0.25
    assert run.figures["eval/total"].steps == [1]
    assert "nonfinite" not in run.figures and run.step == 2


def test_a_run_that_is_still_being_written(tmp_path):
    folder = write_run(tmp_path / "a", figures=[{"step": 1, "reward/total": 0.25}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    (folder / "evaluations.jsonl").write_text('{"step": 1, "prompts": 3}\n[]\n{"step": "x"}\n')
    run = read_run(folder)
    assert run.step == 1 and run.evaluations == []


def test_a_folder_that_was_moved_and_lacks_most(tmp_path):
    folder = write_run(tmp_path / "a", {1: {"total": [0.5]}}, training__max_steps=1)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "config.yaml").write_text("a: [")
    run = read_run(moved)
    assert run.name == "elsewhere" and run.evaluations and run.config == {}
    assert run.problems and run.problems[0].startswith("config.yaml could not be read")


def test_an_evaluation_is_told_where_its_figures_are(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(
        ReportError, match="holds no run: it is what glm-train evaluate wrote, and its figures are in res"
    ):
        read_run(tmp_path)


def test_what_is_no_run_is_told_all_at_once_with_the_run_around_it(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "checkpoints").mkdir()
    with pytest.raises(ReportError) as caught:
        read_runs([folder / "checkpoints", tmp_path / "nowhere"])
    assert f"the run is {folder}" in str(caught.value) and "nowhere is no folder" in str(caught.value)
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ReportError, match=rf"as is no folder: .*; did you mean {folder}\?$"):
        read_runs([tmp_path / "as"])


def test_names_tell_runs_apart(tmp_path):
    folders = [write_run(tmp_path / x / "run") for x in ("one", "two")]
    assert [run.name for run in read_runs(folders)] == ["one/run", "two/run"]
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["run (1)", "run (2)"]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["one/run (1)", "two/run", "one/run (3)"]


@pytest.mark.parametrize(("total", "state"), [(None, "ended"), (5, "finished"), (6, "stopped")])
def test_what_became_of_it(tmp_path, total, state):
    run = read_run(write_run(tmp_path / "a", figures=[{"step": 5, "x": 1.0}], total_steps=total))
    assert run.state == state


def test_a_run_that_is_going(tmp_path):
    folder = write_run(tmp_path / "a", figures=[{"step": 5, "x": 1.0}], total_steps=5)
    lock = FolderLock(folder)
    lock.acquire()
    try:
        assert read_run(folder).state == "running"
        assert read_runs([folder], ended=True)[0].state == "finished"
    finally:
        lock.release()
    assert read_run(folder).state == "finished"


def test_notes_are_the_lines_of_the_log(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "train.log").write_text(
        "2026-01-01 10:00:00,123 INFO glm_training.utils.logging: warning: monitor edges: 3\n"
        "2026-01-01 10:00:01,123 INFO glm_training.utils.logging: saved /x\n"
        "2026-01-01 10:00:02,123 WARNING glm_training.utils.failures: writing failed\n"
        "Traceback\n"
        "2026-01-01 10:00:03,123 INFO glm_training.utils.logging: a remark\n"
    )
    notes = read_run(folder).notes
    assert [(note.warning, note.text) for note in notes] == [
        (True, "monitor edges: 3"),
        (True, "writing failed"),
        (False, "a remark"),
    ]


def test_samples_after_the_last_logged_step_are_of_a_discarded_stretch(tmp_path):
    folder = write_run(tmp_path / "a", figures=[{"step": 4, "x": 1.0}])
    for step in (2, 6):
        place = folder / "samples" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for i in (0, 1, 10):
            (place / f"{i}.png").write_bytes(b"")
        (place / "prompts.txt").write_text("a\nb\nc\n")
    (sampled,) = read_run(folder).samples
    assert sampled.step == 2 and sampled.prompts == ["a", "b", "c"]
    assert [path.stem for path in sampled.files] == ["0", "1", "10"]


def test_a_number_that_no_axis_can_have_is_none(tmp_path):
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 1, "x": NaN, "y": 1e999, "z": true, "w": "text"}\n')
    figures = read_run(folder).figures
    assert figures["x"].values == [None] and figures["y"].values == [None] and "w" not in figures


def test_sessions_say_how_long_the_run_is(tmp_path):
    folder = write_run(tmp_path / "a", total_steps=3)
    write_lines(folder / "sessions.jsonl", [{"step": 0, "total_steps": 3}, {"step": 2, "total_steps": 8}])
    assert read_run(folder).total_steps == 8


def test_flattened():
    assert flattened({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
    assert json.dumps(flattened({})) == "{}"


def test_a_run_that_was_made_shorter_than_it_is_has_its_own_steps(tmp_path):
    run = read_run(write_run(tmp_path / "a", figures=[{"step": 5, "x": 1.0}], total_steps=3))
    assert (run.step, run.total_steps, run.state) == (5, 5, "finished")
