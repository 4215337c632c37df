"""What lies between the stages, as files and as a table; how processes share the work."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from glm_training.evaluation.suites import stages
from glm_training.evaluation.suites.files import PartFile, digest, lines_of, read_settings, settle
from glm_training.evaluation.suites.protocol import EvaluationError, Figure, Picture, Scores
from glm_training.evaluation.suites.results import results, table
from glm_training.evaluation.suites.stages import Place, generate, judge, together
from glm_training.utils.distributed import World


def test_settings_of_one_stage_do_not_touch_those_of_another(tmp_path):
    settle(tmp_path, "pictures", {"seed": 1, "path": None}, remedy="Go away")
    settle(tmp_path, "judge", {"model": "ä"}, remedy="Go away")
    assert read_settings(tmp_path) == {"pictures": {"seed": 1, "path": None}, "judge": {"model": "ä"}}
    settle(tmp_path, "pictures", {"path": None, "seed": 1}, remedy="Go away")
    for other, told in (
        ({"seed": 1}, "path: null there, nothing now"),
        ({"seed": 1, "path": 0}, "path: null there, 0 now"),
    ):
        with pytest.raises(EvaluationError) as raised:
            settle(tmp_path, "pictures", other, remedy="Go away")
        assert str(raised.value).splitlines()[1:] == [f"  {told}", "Go away"]
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(EvaluationError, match="is not what glm-train evaluate wrote"):
        read_settings(tmp_path)
    assert read_settings(tmp_path / "nowhere") == {}


def test_a_digest_does_not_know_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    assert len(digest(None)) == 16 and int(digest(None), 16) >= 0


def test_every_process_has_a_file_of_its_own_and_adds_to_it(tmp_path):
    for rank, picture in ((0, "a"), (12, "b"), (12, "c")):
        PartFile(tmp_path, rank).append([{"picture": picture}])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "records.part-00000.jsonl": '{"picture": "a"}\n',
        "records.part-00012.jsonl": '{"picture": "b"}\n{"picture": "c"}\n',
    }
    with pytest.raises(ValueError):
        lines_of([{"x": math.nan}])


FIGURES = [
    Figure("share", 0.125, 0.0625, 8, "prompts", 100),
    Figure("distance", 2.0),
    Figure("nothing", None),
    Figure("psnr", math.inf, None, 3),
]


def test_results_say_what_was_judged_and_by_whom():
    scores = Scores(FIGURES, [], ["a remark"])
    settings = {"judge": {"judge": "an eye"}, "pictures": {"seed": 1}}
    told = json.loads(results("suite", scores, settings, pictures=5, failures={"a.png": "torn", "b.png": "black"}))
    assert (told["suite"], told["judge"], told["pictures"], told["judged"]) == ("suite", "an eye", 5, 3)
    assert told["failures"] == {"a.png": "torn", "b.png": "black"} and told["remarks"] == ["a remark"]
    assert told["settings"] == settings
    assert [(f["name"], f["value"], f["judge"]) for f in told["figures"]] == [
        ("share", 0.125, "an eye"), ("distance", 2.0, "an eye"), ("nothing", None, "an eye"), ("psnr", "inf", "an eye"),
    ]  # fmt: skip


def test_a_table_scales_its_figures_and_keeps_to_80_columns():
    lines = table("suite", Scores(FIGURES[:3], [], ["word " * 30]), "an eye")
    assert lines[0] == "suite, judged by an eye (+-: standard error)"
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:5]}
    assert cells["share"] == ["12.5", "6.2", "8", "prompts"] and cells["distance"][0] == "2.000"
    assert len(cells["nothing"]) == 3 and len(set(cells["nothing"])) == 1, "a mark for what is absent"
    assert all(len(line) <= 80 for line in lines) and len(lines) == 7
    long = table("suite", Scores([Figure("word " * 30, 0.5)]), "an eye")
    assert all(len(line) <= 80 for line in long) and len(long) > 3


class Suite:
    """Twenty pictures, of which it says their number."""

    name, judged_by, judge_settings = "numbers", "counting", {}

    def __init__(self) -> None:
        self.judged: list[list[int]] = []
        self.prepared = 0

    def pictures(self):
        return [Picture(f"{index}.png", "x", index) for index in range(20)]

    def prepare(self, folder):
        self.prepared += 1

    def check_judge(self):
        pass

    def judge(self, pictures):
        self.judged.append([picture.index for picture, _ in pictures])
        return [{"number": picture.index} for picture, _ in pictures]


def test_two_processes_draw_and_judge_every_other_group(tmp_path, monkeypatch):
    """One after the other here; what they would tell each other is what each has."""
    monkeypatch.setattr(stages, "gather_objects", lambda world, own: [own])
    monkeypatch.setattr(stages, "broadcast_object", lambda world, own: own if world.is_main else {})
    drawn: dict[int, list[list[int]]] = {0: [], 1: []}
    for rank in (0, 1):

        def make(pictures, rank=rank):
            drawn[rank].append([picture.index for picture in pictures])
            return [Image.new("RGB", (2, 2)) for _ in pictures]

        suite = Suite()
        generate(suite, make, {"seed": 1}, Place(tmp_path), World(rank, 2), at_once=6)
        assert suite.prepared == (rank == 0)
    assert drawn == {0: [[*range(6)], [*range(12, 18)]], 1: [[*range(6, 12)], [18, 19]]}
    judged = {}
    for rank in (0, 1):
        suite = Suite()
        judge(suite, Place(tmp_path), World(rank, 2))
        judged[rank] = suite.judged
    assert judged == {0: [[*range(8)], [*range(16, 20)]], 1: [[*range(8, 16)]]}, "at most eight at once"


def test_the_first_that_fails_is_told_on_every_process(monkeypatch):
    monkeypatch.setattr(stages, "gather_objects", lambda world, own: [None, "the first", "the second"])
    monkeypatch.setattr(stages, "broadcast_object", lambda world, own: own)
    with pytest.raises(EvaluationError, match="^the first$"):
        together(World(0, 3), lambda: 1)

    def fails():
        raise OSError("disk")

    seen = []
    monkeypatch.setattr(stages, "gather_objects", lambda world, own: seen.append(own) or [own])
    with pytest.raises(EvaluationError, match="^disk$"):
        together(World(1, 2), fails)
    assert together(World(1, 2), fails, main_only=True) is None and seen == ["disk", None]
    assert together(World(0, 2), lambda: 5, main_only=True) == together(World(0, 2), lambda: 5) == 5
    with pytest.raises(OSError):
        together(World(), fails)
