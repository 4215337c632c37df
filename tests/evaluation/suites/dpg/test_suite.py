"""DPG-Bench's files and its judges, on pictures of the tiny world and on models whose answers are known."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from glm_training.evaluation.suites.answering import ShapesAnswerer
from glm_training.evaluation.suites.dpg.questions import read_prompts, read_questions
from glm_training.evaluation.suites.dpg.suite import DPG
from glm_training.evaluation.suites.drawing import tiled
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from glm_training.evaluation.suites.stages import Place, generate, judge, score
from glm_training.utils.distributed import World
from tests.small_world import Jitter, draw, parse

TINY = Path(__file__).parents[4] / "data/benchmarks/dpg_tiny"
HEAD = "item_id,text,proposition_id,dependency,tuple,question_natural_language\n"
ROW = "a,t,1,0,entity - whole (circle),Is there a circle?\n"


def suite(prompts: Path | None = TINY / "prompts", questions: Path = TINY / "questions.csv", samples: int = 4) -> DPG:
    return DPG(None if prompts is None else read_prompts(prompts), read_questions(questions), samples, ShapesAnswerer())


def few() -> DPG:
    """Every fourth item of the shipped ones: a count, colours and relations."""
    prompts, questions = read_prompts(TINY / "prompts"), read_questions(TINY / "questions.csv")
    names = list(prompts)[::4]
    return DPG({name: prompts[name] for name in names}, {name: questions[name] for name in names}, 4, ShapesAnswerer())


def world_maker(blank: tuple[int, ...]):
    """What the prompts ask for, but nothing in the tiles of these places."""

    def make(pictures):
        nothing = Image.new("RGB", (128, 128), (238, 238, 234))
        return [
            tiled([nothing if s in blank else draw(parse(p.prompt), Jitter(0, 0)) for s in p.samples]) for p in pictures
        ]

    return make


def figures_of(tested: DPG, place: Place) -> dict[str, float | None]:
    judge(tested, place, World())
    scores = score(tested, place, World())
    assert scores is not None
    return {figure.name: figure.value for figure in scores.figures}


@pytest.mark.parametrize("blank", [(), (0,), (3,), (1, 2)])
def test_every_tile_counts_a_quarter(tmp_path, blank):
    place = Place(tmp_path)
    generate(few(), world_maker(blank), {}, place, World(), at_once=2)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names[:2] == ["tiny00.png", "tiny04.png"] and len(names) == 6
    assert Image.open(tmp_path / names[0]).size == (256, 256)
    figures = figures_of(few(), place)
    assert set(figures) >= {"L1 entity", "L2 attribute - color", "L1 relation, before zeroing"}
    assert set(figures.values()) == {1 - len(blank) / 4}


def test_a_folder_is_judged_by_the_names_up_to_their_first_dot_and_the_rest_is_named(tmp_path):
    images = tmp_path / "images"
    generate(few(), world_maker(()), {}, Place(images), World(), at_once=2)
    (images / "tiny04.png").rename(images / "tiny04.seed1.png")
    (images / "tiny08.png").unlink()
    Image.new("RGB", (9, 9)).save(images / "preview.png")
    Image.new("RGB", (9, 8)).save(images / "tiny12.png")
    tested, place = few(), Place(tmp_path / "out", images)
    figures = figures_of(tested, place)
    assert figures["DPG score"] == 1.0
    scores = score(tested, place, World())
    assert scores.figures[0].count == 4 * 4
    assert "3 pictures of 7 could not be judged" in scores.remarks[-1]
    for part in ("preview.png (--questions has no item preview)", "tiny08.png (", "9 x 8 px is no grid of 2 x 2"):
        assert part in scores.remarks[-1]


def test_a_question_without_an_answer_leaves_its_picture_out(tmp_path):
    (tmp_path / "q.csv").write_text(HEAD + ROW + "a,t,2,1,other (x),Is it sad?\n" + ROW.replace("a,", "b,"))
    images = tmp_path / "images"
    images.mkdir()
    for name in "ab":
        tiled([draw(parse("a red circle"), Jitter(0, 0))] * 4).save(images / f"{name}.png")
    tested, place = suite(None, tmp_path / "q.csv"), Place(tmp_path / "out", images)
    judge(tested, place, World())
    scores = score(tested, place, World())
    assert (scores.figures[0].value, scores.figures[0].count) == (1.0, 4)
    assert "a.png (tile 0, question 2: 'Is it sad?' is no question of the tiny world)" in scores.remarks[-1]


def test_single_pictures_are_one_tile():
    tested = suite(samples=1)
    assert tested.pictures()[0].samples == (0,)
    with pytest.raises(EvaluationError, match="--samples 3"):
        suite(samples=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + ROW + "\n", ":3: is empty"),
        (HEAD + ROW + ROW, ":3: is question 1 of a, as line 2 is"),
        (HEAD + ROW.replace("a,t,1", ",t,1"), ":2: has no item_id"),
        (HEAD + ROW.replace(",1,0,", ",one,0,"), ":2: has proposition_id 'one'"),
        (HEAD + ROW.replace(",1,0,", ",1,,"), ":2: has proposition_id '1', dependency ''"),
        (HEAD + ROW.replace(",1,0,", ",1,2,"), ":2: depends on question 2, which its item does not have"),
        (HEAD + ROW.replace(",1,0,", ",1,1,"), ":2: depends on itself in the end"),
        (HEAD + ROW.replace(",1,0,", ',1,"0,2",') + ROW.replace(",1,0,", ",2,1,"), ":3: depends on itself in the end"),
        (HEAD + ROW.replace("Is there a circle?", " "), ":2: has no question_natural_language"),
        (HEAD + ROW.replace("entity - whole (circle)", ""), ":2: has no tuple"),
        (HEAD + ROW.replace("\n", ",more\n"), ":2: has 7 cells where the first line has 6"),
        (HEAD.replace("tuple", "tuples") + ROW, ":1: has no column tuple"),
        (HEAD + ROW.replace("Is there", '"Is there'), ":2: is no CSV from here on"),
        (HEAD, ": holds no questions"),
        ("", ":1: has no column item_id, proposition_id, dependency, tuple, question_natural_language"),
    ],
)
def test_a_hole_in_the_questions_is_told_with_its_line(tmp_path, text, expected):
    path = tmp_path / "q.csv"
    path.write_text(text)
    with pytest.raises(EvaluationError) as raised:
        read_questions(path)
    assert f"{path}{expected}" in str(raised.value), str(raised.value)


def test_texts_with_commas_line_ends_and_several_parents_are_read(tmp_path):
    path = tmp_path / "q.csv"
    rows = ROW + ROW.replace(",1,0,", ",2,0,") + 'a,"one,\ntwo",3,"1, 2",relation - spatial (a),"Is it, then?"\n'
    path.write_text(HEAD + rows + ROW.replace("a,", "b,").replace(",1,0,", ",1,7,"))
    with pytest.raises(EvaluationError, match=r":6: depends on question 7"):
        read_questions(path)
    path.write_text(HEAD + rows)
    *_, last = read_questions(path)["a"]
    assert (last.id, last.parents, last.question) == (3, (1, 2), "Is it, then?")


def test_separators_of_unicode_end_no_line(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_bytes((HEAD + ROW + ROW.replace("a,t,1", "a,t,2").replace("Is there", "Is\u2028there\x85")).encode())
    assert read_questions(path)["a"][1].question == "Is\u2028there\x85 a circle?"
    path.write_bytes(path.read_bytes() + ROW.replace("a,t,1,0", "a,t,3,7").replace("\n", "\r\n").encode())
    with pytest.raises(EvaluationError, match=r"questions.csv:4: depends on question 7"):
        read_questions(path)


def test_what_a_mac_leaves_beside_files_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("a circle")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7")
    assert read_prompts(tmp_path) == {"a": "a circle"}
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "._a.png").write_bytes(b"")
    path = tmp_path / "questions.csv"
    path.write_text(HEAD + ROW)
    assert [picture.path for picture in suite(None, path).find(tmp_path)] == ["a.png"]


@pytest.mark.parametrize("said", ["", "  \n"])
def test_an_empty_answer_is_none_and_no_no(tmp_path, said):
    class Silent(ShapesAnswerer):
        def answer(self, asked):
            return [[said for _ in questions] for _, questions in asked]

    prompts, questions = read_prompts(TINY / "prompts"), read_questions(TINY / "questions.csv")
    tested = DPG(prompts, questions, 1, Silent())
    (found,) = tested.judge([(tested.pictures()[0], Image.new("RGB", (8, 8)))])
    assert found == Failure("tile 0, question 1: shapes answers nothing")


def test_holes_in_the_prompts_are_told_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("\nsecond line")
    (tmp_path / "b.one.txt").write_text("a red circle")
    (tmp_path / "b.two.txt").write_text("a red circle")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError) as raised:
        read_prompts(tmp_path)
    for part in ("a.txt:1: has no prompt in its first line", "b.two.txt: is of the item b, as b.one.txt is", "c.txt"):
        assert part in str(raised.value)
    with pytest.raises(EvaluationError, match="no such folder.*TencentQQGYLab/ELLA"):
        read_prompts(tmp_path / "none")


def test_prompts_and_questions_that_do_not_fit_are_named_on_both_sides(tmp_path):
    (tmp_path / "q.csv").write_text(HEAD + ROW + ROW.replace("a,", "b,"))
    (tmp_path / "prompts").mkdir()
    for name in "ac":
        (tmp_path / f"prompts/{name}.txt").write_text("a red circle")
    expected = "1 item without questions in --questions: c; 1 item of --questions without a file in --prompts: b"
    with pytest.raises(EvaluationError, match=expected):
        suite(tmp_path / "prompts", tmp_path / "q.csv")


def test_the_classical_answerer_knows_the_world():
    image = draw(parse("a red square left of a blue circle"), Jitter(0, 0))
    asked = {
        "Is there a square?": "yes", "Is there a triangle?": "no", "Is the square red?": "yes",
        "Is the square blue?": "no", "Is the triangle red?": "no", "Is the square left of the circle?": "yes",
        "Is the circle left of the square?": "no", "Is the circle right of the square?": "yes",
        "Is the square above the circle?": "no", "Is the square left of the triangle?": "no",
        "Are there exactly two squares?": "no",
    }  # fmt: skip
    assert ShapesAnswerer().answer([(image, list(asked))]) == [list(asked.values())]
    three = draw(parse("three green triangles"), Jitter(0, 0))
    questions = ["Are there exactly three triangles?", "Are the triangles green?", "Are there exactly two triangles?"]
    assert ShapesAnswerer().answer([(three, questions)]) == [["yes", "yes", "no"]]
    assert isinstance(ShapesAnswerer().answer([(three, ["Why?"])])[0][0], Failure)
