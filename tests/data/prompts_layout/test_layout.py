"""A listing is read as what it is, whatever it is called; and what is no listing is refused as what it is."""

import json
import os
import sys
from pathlib import Path

import pytest

from glm_training.data import DataError

RECORDS = [
    {"prompt": f'a sign that says "{word}"', "target": f"target_images/{i}.png"} for i, word in enumerate("ABCD")
]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"
PROMPTS = [record["prompt"] for record in RECORDS]


def scan(files, name: str, text: str | bytes, **changes):
    path = files.root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return files.scan(prompts_file=path, **changes)


def problems(files, name: str, text: str | bytes, **changes) -> list[str]:
    with pytest.raises(DataError) as caught:
        scan(files, name, text, **changes)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", ["captions.json", "captions.txt", "captions", "captions.jsonl", "captions.csv"])
@pytest.mark.parametrize("text", [LINES, json.dumps(RECORDS), json.dumps(RECORDS, indent=2), "\ufeff" + LINES])
def test_records_are_records_under_any_name(files, name: str, text: str) -> None:
    examples = scan(files, name, text, target_images_dir=None).examples
    assert [example.prompt for example in examples] == PROMPTS
    assert [example.target for example in examples] == [(files.targets / f"{i}.png").resolve() for i in range(4)]


@pytest.mark.parametrize("name", ["prompts.json", "prompts.txt"])
def test_a_list_of_prompts_goes_with_numbered_images(files, name: str) -> None:
    examples = scan(files, name, json.dumps(PROMPTS, indent=1)).examples
    assert [example.prompt for example in examples] == PROMPTS
    assert examples[3].target == (files.targets / "3.png").resolve()
    assert f"{name}:3: the prompt of index 1 is empty" in problems(files, name, '[\n"a",\n" ",\n"c", "d"]')[0]
    assert f"{name}:1: the prompt holds half a surrogate" in problems(files, name, '["\\ud800", "b", "c", "d"]')[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "[a red cat] on a mat",
        "{a red cat} on a mat",
        '"OPEN" on a sign',
        '"OPEN"',
        '["a", "b"], two letters',
        '{"scene": "a street", "lens": "35 mm"}',
        "prompt, a stage whisper",
        "a, b, c",
        "{}",
        "[",
    ],
)
def test_a_prompt_may_begin_as_it_likes(files, prompt: str) -> None:
    examples = scan(files, "prompts.txt", f"a thing 0\n{prompt}\na thing 2\na thing 3\n").examples
    assert examples[1].prompt == prompt
    if prompt != "[":
        first = scan(files, "prompts.txt", f"{prompt}\na thing 1\na thing 2\na thing 3\n").examples
        assert first[0].prompt == prompt


def test_one_prompt_may_be_a_scene_in_json(files) -> None:
    scenes = [json.dumps({"scene": f"street {i}", "objects": ["a cat", "a sign"]}) for i in range(4)]
    assert [example.prompt for example in scan(files, "prompts.txt", "\n".join(scenes)).examples] == scenes


def test_a_broken_line_among_records_is_that_lines_fault(files) -> None:
    text = LINES.replace(json.dumps(RECORDS[1]), json.dumps(RECORDS[1])[:-3])
    (found,) = problems(files, "captions.txt", text, target_images_dir=None)
    assert "captions.txt:2: not JSON" in found
    rest = scan(files, "captions.txt", text, target_images_dir=None, max_bad_fraction=0.25)
    assert [example.index for example in rest.examples] == [0, 2, 3]


def test_a_record_among_prompts_is_not_taken_for_one(files) -> None:
    (found,) = problems(files, "prompts.txt", 'a thing\n{"prompt": "x"}\na thing\na thing\n')
    assert "prompts.txt:2: a JSON record among lines that are prompts" in found


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"prompts": [\n"a", "b"]}', "a.json: holds one JSON object"),
        ("a.txt", '{\n"a": 1\n}', "a.txt: holds one JSON object"),
        ("a.json", '{"a": 1}\n{"a": 2}', "a.json:1: its JSON records have no key 'prompt'"),
        ("a.json", '[\n{"prompt": "x"},\n{"prompt"}]', "a.json:3: not JSON"),
        ("a.txt", '[\n{"prompt": "x"},\n{"prompt"}]', "a.txt:3: not JSON"),
        ("a.json", "a red cat\n", "a.json:1: not JSON"),
        ("a.json", "[]", "a.json: holds no prompt"),
        ("a.json", '["a", 1]', "a.json:1: not a JSON object but str"),
        ("a.csv", "prompt,target\nx,0.png\n", "a.csv:1: is a table, with the columns prompt, target"),
        ("a.tsv", "id\tcaption\n1\tx\n", "a.tsv:1: is a table, with the columns id, caption"),
        ("a.txt", "prompt;image\nx;0.png\n", "a.txt:1: is a table"),
        ("a.txt", '"prompt"\n"x"\n', "a.txt:1: is a table, with the columns prompt"),
        ("a.csv", "x,0.png\n", "a.csv: is named as a CSV table"),
        ("a.yaml", "- a cat\n- a dog\n", "a.yaml: is named as YAML"),
        ("a.txt", b"PAR1" + bytes(50), "a.txt: is a Parquet table"),
        ("a.parquet", b"PAR1" + bytes(50), "a.parquet: is a Parquet table"),
        ("a.xlsx", b"PK\x03\x04" + bytes(50), "is a ZIP archive or a spreadsheet"),
        ("a.txt.gz", b"\x1f\x8b\x08" + bytes(50), "is gzip-compressed"),
        ("a.txt", "<!DOCTYPE html>\n<html>", "is a web page"),
        ("a.txt", "<?xml version='1.0'?>\n<a/>", "is XML"),
        ("a.txt", "prompts:\n  - a cat\n  - a dog\n", "a.txt:1: is YAML"),
        ("a.txt", "a cat\t0.png\na dog\t1.png\n", "a.txt:1: is a table, each line with 2 columns between tabs"),
        ("a.txt", "a cat".encode("utf-32"), "a.txt:1: is UTF-32"),
        ("a.txt", '["a cat","a dog",]', "a.txt:1: not JSON: Expecting value at column 18"),
        ("a.txt", "['a cat', 'a dog']", "a.txt:1: not JSON: Expecting value at column 2"),
        ("a.txt", '["a cat",\n"a dog",\n]\n', "a.txt:3: not JSON"),
        ("a.txt", '[{"prompt": "a", "prompt": "b"}]', "a.txt: not readable as JSON: key 'prompt' is given twice"),
        ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of Git LFS"),
    ],
)
def test_what_is_no_listing_is_refused_as_what_it_is(files, name: str, text: str | bytes, expected: str) -> None:
    found = problems(files, name, text, target_images_dir=None, require_targets=False)
    assert expected in found[0], found
    assert len(found) == 1 or "not a JSON object" in expected


def test_a_pipe_and_a_device_are_not_opened(files) -> None:
    os.mkfifo(files.root / "pipe.txt")
    for path in (files.root / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(DataError, match="is not a regular file"):
            files.scan(prompts_file=path)


def test_a_file_too_large_for_a_listing_is_not_read(files, monkeypatch) -> None:
    monkeypatch.setattr("glm_training.data.text_lines.MAX_BYTES", 3)
    assert "too many for a listing" in problems(files, "prompts.txt", "a cat\n")[0]


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ('{"prompt": "%d"},', 16),
        ("{'prompt': '%d'}", 2),
        ('{prompt: "%d"}', 2),
        ('{"id": %d, "caption": "x",}', 26 if sys.version_info < (3, 13) else 25),  # Python's own words
        ("{\u201cprompt\u201d: \u201c%d\u201d}", 2),
        ('{"prompt": "%d" // first', 16),
    ],
)
def test_records_in_almost_json_are_no_prompts(files, line: str, column: int) -> None:
    found = problems(files, "captions.txt", "".join(f"{line % i}\n" for i in range(4)), target_images_dir=None)
    assert len(found) == 4
    for number, problem in enumerate(found, start=1):
        assert f"captions.txt:{number}: not JSON: " in problem and f"at column {column}. Write" in problem


def test_keys_in_another_case_are_told(files) -> None:
    found = problems(files, "captions.txt", LINES.replace('"prompt"', '"Prompt"'), target_images_dir=None)
    assert len(found) == 8 and "unknown key 'Prompt'. Did you mean 'prompt'?" in found[1]


NOTHING = "the prompt of index 1 holds quotation marks and characters that nobody sees, and nothing else"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("\u200b", NOTHING),
        ("\u202e \u202c", NOTHING),
        ("\u200d\ufe0f", NOTHING),
        ('""', NOTHING),
        ("\u201c \u201d", NOTHING),
        ("\u300c\u300d", NOTHING),
        (" \u00a0\u3000\t", "the prompt of index 1 is empty"),
        ("a \x1b[31mred cat", "the prompt holds the control character U+001B at character 2. Remove it"),
        ("\x07bell", "the prompt holds the control character U+0007 at character 0"),
        ("a\x7f", "the prompt holds the control character U+007F at character 1"),
        ("a\x9bred", "the prompt holds the control character U+009B at character 1"),
    ],
)
@pytest.mark.parametrize("kind", ["lines", "json lines", "json list"])
def test_a_prompt_that_says_nothing_or_holds_controls_is_told(files, kind: str, prompt: str, said: str) -> None:
    prompts = ["a cat", prompt, "a dog", "7"]
    text = "".join(f"{line}\n" for line in prompts) if kind == "lines" else json.dumps(prompts, indent=0)
    if kind == "json lines":
        text = "".join(
            json.dumps(record | {"prompt": line}) + "\n" for record, line in zip(RECORDS, prompts, strict=True)
        )
    (found,) = problems(files, "captions.txt", text, **({} if kind != "json lines" else {"target_images_dir": None}))
    assert f"captions.txt:{3 if kind == 'json list' else 2}: {said}" in found


@pytest.mark.parametrize(
    "prompt",
    ["7", "!", "\U0001f389", "\U0001f469\u200d\U0001f467", "\u0639\u0644\u0627\u0645\u0629", '"1"', "null", "-"],
)
def test_short_prompts_of_any_script_are_prompts(files, prompt: str) -> None:
    assert scan(files, "a.txt", f"{prompt}\nb\nc\nd\n").examples[0].prompt == prompt


def test_marks_of_files_put_one_after_the_other_are_no_text(files) -> None:
    examples = scan(files, "a.txt", "\ufeffa\r\n\ufeffb\r\n\ufeff\ufeff c\r\nd\r\n").examples
    assert [example.prompt for example in examples] == ["a", "b", "c", "d"]
