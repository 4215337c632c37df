"""Prompts in the form of their authors: what is read, and what is said of files with holes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.text.prompts import TextPrompt, read_prompts


def write_cvtg(folder: Path, name: str, *prompts: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [{"index": index, "prompt": prompt, "carrier_list": ["sign"]} for index, prompt in enumerate(prompts)]
    path.write_text(json.dumps({"data_list": entries}), encoding="utf-8")
    return path


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{v if isinstance(v, str) else json.dumps(v)}\n" for v in values), encoding="utf-8")
    return path


def line(number=0, text=("HOTEL",), **more):
    return {"prompt_id": number, "prompt": 'a sign that says "HOTEL"', "text": list(text), **more}


def test_cvtg_is_read_from_its_folder_in_a_fixed_order(tmp_path):
    for name in ("CVTG/3.json", "CVTG/2.json", "CVTG-style/2.json", "CVTG/2_combined.json"):
        write_cvtg(tmp_path, name, f"{name} 'Go  Now'", "a note 'Stop'")
    found = read_prompts(tmp_path)
    assert found.benchmark == "cvtg"
    names = ["CVTG/2/0", "CVTG/2/1", "CVTG/3/0", "CVTG/3/1", "CVTG-style/2/0", "CVTG-style/2/1"]
    assert [prompt.name for prompt in found.prompts] == names
    assert found.prompts[2] == TextPrompt("CVTG/3/0", "CVTG/3.json 'Go  Now'", ("go", "now"), "3 areas")
    alone = read_prompts(tmp_path / "CVTG-style" / "2.json")
    assert alone.prompts == found.prompts[4:]
    assert read_prompts(tmp_path / "CVTG").prompts == found.prompts[:4]


def test_longtext_is_read_by_lines(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", line(7, category="sign"), line(2, ["FISH", "SOUP"]))
    found = read_prompts(path)
    assert (found.benchmark, found.language) == ("longtext", "en")
    assert found.prompts == (
        TextPrompt("7", 'a sign that says "HOTEL"', ("HOTEL",), "sign"),
        TextPrompt("2", 'a sign that says "HOTEL"', ("FISH", "SOUP"), "text"),
    )


@pytest.mark.parametrize(
    ("texts", "language"),
    [(["每日"], "zh"), (["每日", "Open"], "zh"), (["每日", "Open", "Now"], "en"), (["Open"], "en")],
)
def test_the_language_is_that_of_the_texts(tmp_path, texts, language):
    assert read_prompts(write_lines(tmp_path / "p.jsonl", line(0, texts))).language == language


def test_every_fault_of_longtext_is_told_with_its_line(tmp_path):
    path = write_lines(
        tmp_path / "p.jsonl",
        line(0),
        "",
        "{broken",
        {"prompt_id": 1, "text": ["x"]},
        line(0),
        {"prompt": "p", "text": ["x"]},
        {**line(3), "text": "HOTEL"},
        line(4, ["!!!"]),
        [1],
    )
    with pytest.raises(EvaluationError) as told:
        read_prompts(path)
    lines = str(told.value).splitlines()
    wanted = [
        (2, "the line is empty"),
        (3, "not JSON"),
        (4, "key 'prompt' is missing"),
        (5, 'repeats the "prompt_id" 0 of line 1'),
        (6, 'has no "prompt_id"'),
        (7, 'no list of texts under "text"'),
        (8, 'no letter or digit in "text"'),
        (9, "is no JSON object"),
    ]
    assert len(lines) == 1 + len(wanted)
    for text, (number, said) in zip(lines[1:], wanted, strict=True):
        assert f"p.jsonl:{number}: " in text and said in text


def test_every_fault_of_cvtg_is_told_with_its_place(tmp_path):
    path = tmp_path / "2.json"
    entries = [
        {"index": 0, "prompt": "a sign 'Go'"},
        {"index": 0, "prompt": "a sign 'Go'"},
        {"index": "../x", "prompt": "a sign 'Go'"},
        {"index": 3, "prompt": 'a sign "Go"'},
        {"index": 4},
        7,
        {"index": "0", "prompt": "a sign 'Go'"},
        {"index": "0_1", "prompt": "a sign 'Go'"},
    ]
    path.write_text(json.dumps({"data_list": entries}))
    with pytest.raises(EvaluationError) as told:
        read_prompts(path)
    text = str(told.value)
    for said in (
        'data_list[1] repeats the "index" 0 of data_list[0]',
        "data_list[2] has the \"index\" '../x'",
        "data_list[3] quotes no text in single quotes",
        "data_list[4] key 'prompt' is missing",
        "data_list[5] is no JSON object",
        'data_list[6] repeats the "index" 0 of data_list[0]',
        "data_list[7] has the \"index\" '0_1'",  # the second picture of 0 is called so
    ):
        assert said in text
    (tmp_path / "3.json").write_text('{"data_list": {}}')
    with pytest.raises(EvaluationError, match=r"3.json: has no list under"):
        read_prompts(tmp_path / "3.json")
    (tmp_path / "3.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"3.json: is not CVTG-2K's JSON"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("name", ["absent", "empty", "nothing.jsonl"])
def test_where_there_are_no_prompts_the_source_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.jsonl").touch()
    with pytest.raises(EvaluationError, match=r"CVTG-2K.zip.*text_prompts.jsonl"):
        read_prompts(tmp_path / name)
