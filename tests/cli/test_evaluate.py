"""`glm-train evaluate`: real pictures of the tiny model, the same again however often it is stopped, and what it
refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm_training.cli.main import main
from tests.warm import run_two

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data/benchmarks/geneval_tiny.jsonl"
QUICK = ["--steps", "2", "--guidance", "1", "--samples", "2", "--at-once", "3"]


def evaluate(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["glm-train", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    told = capsys.readouterr()
    return int(exit_.value.code or 0), told.out, told.err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Two of the shipped prompts: a count and a place."""
    lines = TINY.read_text().splitlines()
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join([lines[19], lines[33]]) + "\n")
    return path


@pytest.fixture
def words(prompts) -> list[object]:
    return ["--suite", "geneval", "--detector", "shapes", "--prompts", prompts, *QUICK]


def test_it_is_the_same_when_run_twice_when_stopped_and_over_two_processes(
    tmp_path, monkeypatch, capsys, words, prompts
):
    whole = tmp_path / "whole"
    code, out, err = evaluate(monkeypatch, capsys, *words, "--out", whole)
    assert code == 0 and err == "" and "drawing 4 pictures" in out, err
    *lines, last = out.splitlines()
    assert all(len(line) <= 80 for line in lines) and last == f"{whole / 'results.json'} has everything"
    told = json.loads((whole / "results.json").read_text())
    assert {figure["name"]: figure["count"] for figure in told["figures"]}["counting"] == 2
    assert told["settings"]["pictures"]["sampling"]["num_inference_steps"] == 2
    first = contents(whole)
    assert {"00000/samples/0000.png", "00001/samples/0001.png", "records.jsonl", "results.jsonl"} <= set(first)

    code, out, _ = evaluate(monkeypatch, capsys, *words, "--out", whole)
    assert code == 0 and "drawing" not in out and "judging" not in out and contents(whole) == first

    stopped = tmp_path / "stopped"  # as a kill leaves it: in the middle of a group, of a picture and of a record
    shutil.copytree(whole, stopped)
    (stopped / "00001/samples/0000.png").write_bytes(first["00001/samples/0000.png"][:900])
    (stopped / "00001/samples/0001.png").unlink()
    (stopped / "results.json").unlink()
    (stopped / "records.part-00000.jsonl").write_bytes(first["records.jsonl"][:-300])
    (stopped / "records.jsonl").unlink()
    code, out, _ = evaluate(monkeypatch, capsys, *words, "--out", stopped)
    assert code == 0 and "drawing 4 pictures" in out and contents(stopped) == first

    pair = run_two("-m", "glm_training.cli.main", "evaluate", *map(str, words), "--out", str(tmp_path / "two"))
    assert [done.returncode for done in pair] == [0, 0], pair
    assert contents(tmp_path / "two") == first
    said = [line for line in pair[1].stdout.splitlines() if not line.startswith("[Gloo] ")]  # torch 2.8 does
    assert said == []


def test_stages_run_one_by_one(tmp_path, monkeypatch, capsys, words):
    out = tmp_path / "out"
    code, _, err = evaluate(monkeypatch, capsys, *words, "--out", out, "--stage", "score")
    assert code == 2 and "have no record" in err
    code, _, err = evaluate(monkeypatch, capsys, *words, "--out", out, "--stage", "judge")
    assert code == 2 and "are not drawn" in err and "--stage generate" in err
    assert contents(out) == {}
    code, told, _ = evaluate(monkeypatch, capsys, *words, "--out", out, "--stage", "generate", "--model", "tiny-random")
    assert code == 0 and not (out / "records.jsonl").exists() and "generate done" in told
    code, *_ = evaluate(monkeypatch, capsys, *words, "--out", out, "--stage", "judge")
    assert code == 0 and (out / "records.jsonl").exists() and not (out / "results.json").exists()
    for picture in out.rglob("*.png"):  # figures are made of records and of nothing else
        picture.unlink()
    alone = [word for word in words if word not in ("--detector", "shapes")]
    code, told, err = evaluate(monkeypatch, capsys, *alone, "--out", out, "--stage", "score")
    assert code == 0 and "counting" in told and "judged by shapes, colours shapes" in told, err


def test_records_of_other_questions_are_not_scored(tmp_path, monkeypatch, capsys, words, prompts):
    out, changed = tmp_path / "out", tmp_path / "changed.jsonl"
    more = [*words, "--model", "tiny-random"]
    assert evaluate(monkeypatch, capsys, *more, "--out", out)[0] == 0
    changed.write_text(prompts.read_text().replace('"count": 2', '"count": 1').replace('"count": 3', '"count": 2'))
    before = contents(out)
    code, told, err = evaluate(monkeypatch, capsys, *more, "--prompts", changed, "--out", out)
    assert code == 2 and "00000/metadata.jsonl asks for other things" in err and "drawing" not in told, err
    code, told, err = evaluate(monkeypatch, capsys, *more, "--prompts", changed, "--out", out, "--stage", "judge")
    assert code == 2 and "asked: " in err and "judging" not in told, err
    assert contents(out) == before


def test_a_folder_in_use_is_left_alone(tmp_path, monkeypatch, capsys, words):
    from glm_training.utils.folder_lock import FolderLock

    lock = FolderLock(tmp_path / "out")
    lock.acquire()
    code, _, err = evaluate(monkeypatch, capsys, *words, "--model", "tiny-random", "--out", tmp_path / "out")
    lock.release()
    assert code == 2 and "is in use by another run" in err


def test_other_settings_are_named_and_nothing_is_drawn_over(tmp_path, monkeypatch, capsys, words):
    out = tmp_path / "out"
    more = [*words, "--model", "tiny-random", "--stage", "generate"]
    assert evaluate(monkeypatch, capsys, *more, "--out", out)[0] == 0
    before = contents(out)
    code, _, err = evaluate(monkeypatch, capsys, *more, "--out", out, "--seed", 5, "--steps", 3)
    assert code == 2 and "seed: 0 there, 5 now" in err and '"num_inference_steps": 3' in err, err
    assert contents(out) == before


@pytest.mark.parametrize("family", ["sdxl"])
def test_other_families_draw_too(tmp_path, monkeypatch, capsys, words, family):
    out = tmp_path / "out"
    more = ["--family", family, "--model", "tiny-random", "--height", 64, "--width", 64]
    code, _, err = evaluate(monkeypatch, capsys, *words, *more, "--out", out)
    assert code == 0, err
    assert json.loads((out / "settings.json").read_text())["pictures"]["family"] == family


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--prompts", "no/such.jsonl"], "--prompts no/such.jsonl: there is no such file. GenEval's own is"),
        (["--detector", "yolo"], "--detector yolo: write transformers:MODEL, http://host:port or shapes"),
        (["--detector", "transformers:nobody/nothing"], "hf download nobody/nothing"),
        (["--colors", "nobody/nothing"], "hf download nobody/nothing"),
        (["--images", "no/such/folder"], "--images no/such/folder is no folder"),
        (["--images", ".", "--stage", "generate"], "--stage generate draws pictures, and --images has them already"),
        (["--suite", "dpg"], "--suite dpg needs --questions. DPG-Bench's own are"),
        (["--suite", "dpg", "--questions", "no.csv", "--judge", "shapes"], "there is no such folder of .txt files"),
        (["--model", "no/where"], "no/where"),
        (["--height", "40"], "40"),
    ],
)
def test_what_is_at_fault_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys, words, changes, expected):
    out = tmp_path / "out"
    code, _, err = evaluate(monkeypatch, capsys, *words, "--model", "tiny-random", *changes, "--out", out)
    assert code == 2 and expected in err and "Traceback" not in err, err
    assert err.startswith("error: ") and not out.exists(), list(out.rglob("*"))


def test_an_option_too_few_is_told(tmp_path, monkeypatch, capsys, prompts):
    code, _, err = evaluate(monkeypatch, capsys, "--suite", "geneval", "--out", tmp_path / "out")
    assert code == 2 and "--suite geneval needs --prompts" in err
    code, _, err = evaluate(monkeypatch, capsys, "--suite", "geneval", "--prompts", prompts, "--out", tmp_path / "out")
    assert code == 2 and "--suite geneval needs --detector" in err
    words = ["--suite", "dpg", "--prompts", ROOT / "data/benchmarks/dpg_tiny/prompts"]
    words += ["--questions", ROOT / "data/benchmarks/dpg_tiny/questions.csv", "--out", tmp_path / "out"]
    code, _, err = evaluate(monkeypatch, capsys, *words)
    assert code == 2 and "--suite dpg needs --judge" in err


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "sys.argv = ['glm-train', 'evaluate', '--help']\n"
        "from glm_training.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--detector" in done.stdout and "--judge" in done.stdout
