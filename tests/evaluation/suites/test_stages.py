"""The frame of every benchmark: what is whole is not done again, what is torn is, and nothing is mixed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm_training.evaluation.suites.files import PartFile, merge_records, read_records
from glm_training.evaluation.suites.protocol import EvaluationError, Failure, Picture, Scores, mean_of
from glm_training.evaluation.suites.stages import Place, generate, judge, score
from glm_training.utils.distributed import World

LEVELS = (10, 20, 30, 40, 250)


class Brightness:
    """Pictures of one grey each; their mean. `unsaid`: pictures of which the judge has nothing to say."""

    name = "brightness"
    judged_by = "mean of the pixels"

    def __init__(self) -> None:
        self.judge_settings: dict[str, object] = {}
        self.unsaid: set[str] = set()
        self.seen: list[str] = []

    def pictures(self):
        return [Picture(f"{index:02d}/grey.png", f"grey {level}", index) for index, level in enumerate(LEVELS)]

    def prepare(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("prepared")

    def find(self, folder: Path):
        return [picture for picture in self.pictures() if (folder / picture.path).parent.is_dir()]

    def check_judge(self) -> None:
        pass

    def judge(self, pictures):
        self.seen += [picture.path for picture, _ in pictures]
        return [
            Failure("too grey") if picture.path in self.unsaid else {"mean": float(np.mean(image))}
            for picture, image in pictures
        ]

    def score(self, records):
        return Scores([mean_of("brightness", {r["picture"]: [r["mean"]] for r in records})])


class Maker:
    """Draws a grey of its prompt; `calls` are the pictures of each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.stops_after = 1000

    def __call__(self, pictures):
        if len(self.calls) == self.stops_after:
            raise KeyboardInterrupt
        self.calls.append([picture.path for picture in pictures])
        return [Image.new("RGB", (4, 4), (int(picture.prompt.split()[1]),) * 3) for picture in pictures]


def everything(place: Place, suite: Brightness, maker: Maker, settings=None, world=None) -> Scores:
    world = world or World()
    generate(suite, maker, settings or {"seed": 0}, place, world, at_once=2)
    judge(suite, place, world)
    return score(suite, place, world)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_three_stages_give_the_mean_with_its_error(tmp_path):
    scores = everything(Place(tmp_path), Brightness(), Maker())
    (figure,) = scores.figures
    assert (figure.value, figure.count) == (70.0, 5)
    # s^2 = (60^2 + 50^2 + 40^2 + 30^2 + 180^2) / 4 = 10250, over sqrt(5)
    assert figure.error == pytest.approx((10250 / 5) ** 0.5, rel=1e-12)
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["figures"][0] | {"error": None} == {
        "name": "brightness", "value": 70.0, "error": None, "count": 5, "of": "pictures", "scale": 1.0,
        "judge": "mean of the pixels",
    }  # fmt: skip
    assert told["settings"]["pictures"] == {"suite": "brightness", "seed": 0, "at_once": 2}


def test_a_second_run_draws_and_judges_nothing(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    before = contents(tmp_path)
    suite, maker = Brightness(), Maker()
    everything(Place(tmp_path), suite, maker)
    assert (maker.calls, suite.seen) == ([], [])
    assert contents(tmp_path) == before


def test_a_killed_drawing_goes_on_where_it_was(tmp_path):
    everything(Place(tmp_path / "whole"), Brightness(), Maker())
    place, maker = Place(tmp_path / "killed"), Maker()
    maker.stops_after = 1
    with pytest.raises(KeyboardInterrupt):
        everything(place, Brightness(), maker)
    with pytest.raises(EvaluationError, match=r"3 pictures of 5 are not drawn.*02/grey.png.*--stage generate"):
        judge(Brightness(), place, World())
    rest = Maker()
    everything(place, Brightness(), rest)
    assert maker.calls + rest.calls == [["00/grey.png", "01/grey.png"], ["02/grey.png", "03/grey.png"], ["04/grey.png"]]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_torn_picture_is_drawn_again_in_its_group_and_its_neighbour_stays(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    before = contents(tmp_path)
    torn, neighbour = tmp_path / "02/grey.png", tmp_path / "03/grey.png"
    torn.write_bytes(before["02/grey.png"][:-20])
    when = neighbour.stat().st_mtime_ns
    suite, maker = Brightness(), Maker()
    everything(Place(tmp_path), suite, maker)
    assert maker.calls == [["02/grey.png", "03/grey.png"]] and neighbour.stat().st_mtime_ns == when
    assert suite.seen == [] and contents(tmp_path) == before


def test_a_torn_record_is_made_again(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    before = contents(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(before["records.jsonl"][:-9])
    suite = Brightness()
    everything(Place(tmp_path), suite, Maker())
    assert suite.seen == ["04/grey.png"] and contents(tmp_path) == before


def test_parts_of_a_killed_judge_are_merged_and_a_later_record_counts(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    before = (tmp_path / "records.jsonl").read_bytes()
    lines = before.splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(lines[3] + b'{"picture": "00/grey.png", "failure": "away"}\n')
    (tmp_path / "records.part-00001.jsonl").write_bytes(lines[2] + lines[0])
    (tmp_path / "records.part-00000.jsonl").write_bytes(lines[1] + lines[4][:10])
    suite = Brightness()
    judge(suite, Place(tmp_path), World())
    assert suite.seen == ["04/grey.png"]
    assert (tmp_path / "records.jsonl").read_bytes() == before and not list(tmp_path.glob("records.part*"))


def test_a_line_that_is_no_record_is_named(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"picture": "01', b'"pict": "01'))
    with pytest.raises(EvaluationError, match=r"records.jsonl:2: is no record .*delete the line"):
        score(Brightness(), Place(tmp_path), World())


def test_a_record_that_is_none_of_the_suites_is_named(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker())
    path = tmp_path / "records.jsonl"
    for spoilt in (b'"median"', b'"mean": "x", "m"'):
        records = path.read_bytes()
        path.write_bytes(records.replace(b'"mean"', spoilt, 2).replace(spoilt, b'"mean"', 1))
        with pytest.raises(EvaluationError, match=r"says of 01/grey.png is no record of --suite brightness .*delete"):
            score(Brightness(), Place(tmp_path), World())
        path.write_bytes(records)
    assert score(Brightness(), Place(tmp_path), World()).figures[0].value == 70.0


def test_records_of_other_pictures_or_questions_are_not_scored(tmp_path):
    for name, level in (("mine", 10), ("yours", 20)):
        (tmp_path / name / "00").mkdir(parents=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / name / "00/grey.png")
    suite, place = Brightness(), Place(tmp_path / "out", tmp_path / "mine")
    suite.judge_settings = {"asked": 1}
    judge(suite, place, World())
    with pytest.raises(EvaluationError, match=r'images: ".*mine" there, ".*yours" now\nGive the settings of then'):
        score(suite, Place(tmp_path / "out", tmp_path / "yours"), World())
    suite.judge_settings = {"asked": 2}
    with pytest.raises(EvaluationError, match=r"asked: 1 there, 2 now"):
        score(suite, place, World())
    assert not (tmp_path / "out/results.json").exists()
    suite.judge_settings = {"asked": 1, "of a judge that is asked nothing": 3}
    assert score(suite, place, World()).figures[0].value == 10.0


def test_other_settings_are_refused_by_name_and_change_nothing(tmp_path):
    everything(Place(tmp_path), Brightness(), Maker(), {"seed": 0, "steps": 5})
    before = contents(tmp_path)
    with pytest.raises(
        EvaluationError, match=r"seed: 0 there, 1 now\n  steps: 5 there, nothing now\nGive another --out"
    ):
        everything(Place(tmp_path), Brightness(), Maker(), {"seed": 1})
    suite = Brightness()
    suite.judge_settings = {"threshold": 0.5}
    with pytest.raises(EvaluationError, match=r"threshold: nothing there, 0.5 now"):
        judge(suite, Place(tmp_path), World())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["records.jsonl", "results.json", "results.jsonl"])
def test_files_of_unknown_origin_are_neither_written_over_nor_taken_for_ours(tmp_path, name):
    everything(Place(tmp_path / "other"), Brightness(), Maker())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes((tmp_path / "other/records.jsonl").read_bytes())
    before = contents(tmp_path / "out")
    for stage in (
        lambda place: everything(place, Brightness(), Maker()),
        lambda place: judge(Brightness(), Place(place.out, tmp_path / "other"), World()),
        lambda place: score(Brightness(), place, World()),
    ):
        with pytest.raises(EvaluationError, match=rf"out/{name} is there, and no settings.json says what made it"):
            stage(Place(tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_pictures_of_unknown_origin_are_not_taken_for_ours(tmp_path):
    (tmp_path / "01").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "01/grey.png")
    maker = Maker()
    with pytest.raises(EvaluationError, match="holds 01/grey.png, and nothing is known of how it was drawn"):
        everything(Place(tmp_path), Brightness(), maker)
    assert maker.calls == [] and sorted(contents(tmp_path)) == ["01/grey.png"]


def test_what_cannot_be_judged_is_counted_named_and_tried_again(tmp_path):
    suite = Brightness()
    suite.unsaid = {"04/grey.png"}
    scores = everything(Place(tmp_path), suite, Maker())
    assert (scores.figures[0].value, scores.figures[0].count) == (25.0, 4)
    assert scores.remarks == ["1 picture of 5 could not be judged and count nowhere: 04/grey.png (too grey)"]
    told = json.loads((tmp_path / "results.json").read_text())
    assert (told["pictures"], told["judged"], told["failures"]) == (5, 4, {"04/grey.png": "too grey"})
    suite.unsaid, suite.seen = set(), []
    scores = everything(Place(tmp_path), suite, Maker())
    assert suite.seen == ["04/grey.png"] and scores.figures[0].value == 70.0 and scores.remarks == []


def test_what_has_failed_is_tried_again_where_its_file_cannot_be_read_any_more(tmp_path):
    images, place = tmp_path / "mine", Place(tmp_path / "out", tmp_path / "mine")
    for index in (0, 1):
        (images / f"{index:02d}").mkdir(parents=True)
        Image.new("RGB", (4, 4), (10,) * 3).save(images / f"{index:02d}/grey.png")
    suite = Brightness()
    suite.unsaid = {"01/grey.png"}
    judge(suite, place, World())
    assert score(suite, place, World()).remarks[0].endswith("01/grey.png (too grey)")
    (images / "01/grey.png").write_bytes(b"no picture")
    judge(suite, place, World())
    remark = score(suite, place, World()).remarks[0]
    assert "too grey" not in remark and "mine/01/grey.png" in remark, "what is told is of now"


def test_no_figures_of_nothing(tmp_path):
    suite = Brightness()
    suite.unsaid = {picture.path for picture in suite.pictures()}
    with pytest.raises(EvaluationError, match="no picture could be judged.*00/grey.png: too grey"):
        everything(Place(tmp_path), suite, Maker())
    assert not (tmp_path / "results.json").exists()


def test_a_folder_of_the_users_is_judged_and_not_written_to(tmp_path):
    images, out = tmp_path / "mine", tmp_path / "out"
    for index, level in ((0, 10), (1, 20), (4, 250)):
        (images / f"{index:02d}").mkdir(parents=True)
        Image.new("RGB", (4, 4), (level,) * 3).save(images / f"{index:02d}/grey.png")
    (images / "01/grey.png").write_bytes(b"no picture")
    before = contents(images)
    place, suite = Place(out, images), Brightness()
    judge(suite, place, World())
    scores = score(suite, place, World())
    assert (scores.figures[0].value, scores.figures[0].count) == (130.0, 2)
    assert "1 picture of 3 could not be judged" in scores.remarks[0] and "is not an image" in scores.remarks[0]
    assert contents(images) == before
    Image.new("RGB", (4, 4), (30,) * 3).save(images / "00/grey.png")  # other pictures under the same names
    suite.seen = []
    judge(suite, place, World())
    assert suite.seen == ["00/grey.png"] and score(suite, place, World()).figures[0].value == 140.0


def test_scoring_before_judging_says_what_is_missing(tmp_path):
    generate(Brightness(), Maker(), {}, Place(tmp_path), World(), at_once=2)
    with pytest.raises(EvaluationError, match=r"5 pictures of 5 have no record.*--stage judge"):
        score(Brightness(), Place(tmp_path), World())


def test_records_of_pictures_are_in_their_order_whatever_came_first(tmp_path):
    PartFile(tmp_path, 1).append([{"picture": "b", "x": 1}, {"picture": "zz", "x": 2}])
    PartFile(tmp_path, 0).append([{"picture": "c", "x": 3}, {"picture": "a", "x": 4}])
    merge_records(tmp_path, ["c", "b", "a"])
    assert [record["picture"] for record in read_records(tmp_path / "records.jsonl")] == ["c", "b", "a", "zz"]


def test_the_error_of_a_mean_knows_of_groups():
    # two prompts, (1, 1) and (0, 0): as two values 1 and 0, s = sqrt(1/2), s / sqrt(2) = 1/2
    assert mean_of("x", {0: [1.0, 1.0], 1: [0.0, 0.0]}).error == pytest.approx(0.5, rel=1e-12)
    assert mean_of("x", {0: [1.0], 1: [0.0]}).error == pytest.approx(0.5, rel=1e-12)
    # within the prompts everything differs, between them nothing does
    assert mean_of("x", {0: [1.0, 0.0], 1: [0.0, 1.0]}).error == 0
    # groups of 3 and 1, mean 3/4: sums of deviations 3/4 and -3/4; sqrt(2 * 2 * 9/16) / 4 = 3/8
    assert mean_of("x", {0: [1.0, 1.0, 1.0], 1: [0.0]}).error == pytest.approx(3 / 8, rel=1e-12)
    assert mean_of("x", {0: [1.0, 0.0]}).error is None
    assert mean_of("x", {}).value is None
