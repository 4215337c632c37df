"""YAML that is odd, hostile or older: read by YAML 1.2's core schema within bounds, or refused with its line."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import pytest
import yaml

from glm_training.config import ConfigError, load_config, resolved_yaml
from glm_training.config.loading.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_ENTRIES, read_yaml

VALID = "model: {name: tiny}\nreward: {metrics: {text_accuracy: 1.0}}\n"

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{below}: &{below} [{', '.join([f'*{above}'] * 9)}]\n" for above, below in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED_LAUGHS = "a: &a {x: 1}\n" + "".join(
    f"{below}: &{below} {{<<: [{', '.join([f'*{above}'] * 9)}]}}\n" for above, below in ("ab", "bc", "cd", "de", "ef")
)


def fault(text: str) -> tuple[int | None, str]:
    """Line and text of the one fault."""
    faults = read_yaml(text).faults
    assert len(faults) == 1, faults
    return faults[0].line, ".".join(faults[0].path) + ": " + faults[0].message


def messages(file: Path | str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return [str(problem) for problem in caught.value.problems]


# -- scalars -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("-7", -7), ("+1", 1), ("08", 8), ("0", 0),
        ("1e3", 1000.0), ("1E-5", 1e-5), ("1.", 1.0), (".5", 0.5), ("-.5e1", -5.0),
        ("-.inf", -math.inf), (".INF", math.inf),
        ("true", True), ("False", False), ("~", None), ("null", None), ("", None), ("Null", None),
        ("!!int 010", 10), ("!!float 1", 1.0), ("!!str 1", "1"), ("!!bool true", True), ("'1'", "1"),
    ],
)  # fmt: skip
def test_the_core_schema_of_yaml_1_2(text, value):
    read = read_yaml(text).value
    assert (read, type(read)) == (value, type(value))
    assert read_yaml(f"[{text}]").value == ([value] if text else [])


@pytest.mark.parametrize(
    "text",
    [
        "1:30",
        "1:30:00.5",
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        "n",
        "1_000",
        "0b1",
        "-0o7",
        "2001-12-14",
        "nULL",
        "=",
        "1e",
        "e1",
        "0x",
        ".",
    ],
)
def test_what_yaml_1_1_made_something_of_is_text(text):
    assert read_yaml(text).value == text and read_yaml(f"{{a: {text}}}").value == {"a": text}


def test_not_a_number():
    assert math.isnan(read_yaml(".nan").value)


@pytest.mark.parametrize(
    ("key", "text", "suggestion"),
    [
        ("logging.use_wandb", "yes", "Write `true`."),
        ("logging.use_wandb", "Off", "Write `false`."),
        ("training.batch_size", "1_000", "Write 1000."),
        ("training.batch_size", "1:30", "Write it as one number."),
        ("training.learning_rate", "1_0e-5", "Write 10e-5."),
        ("training.batch_size", "'1_0'", "Write 10."),
        ("training.batch_size", "'010'", "Write it without quotes."),
        ("training.batch_size", "soon", None),
    ],
)
def test_an_older_yaml_s_numbers_and_truths_are_refused_with_what_to_write(tmp_path, key, text, suggestion):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    (message,) = messages(path, f"{key}={text}")
    assert message.endswith(suggestion or "allowed: integer >= 1 and <= 65536.") and f"{key}: " in message


def test_ten_is_ten(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VALID + "seed: 010\n")
    assert load_config(path).seed == 10 and load_config(path, ["seed=0o10"]).seed == 8


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "0o17",
        "010",
        "yes",
        "no",
        "1:30",
        "null",
        "~",
        "<<",
        "=",
        "2001-01-01",
        "0x1F",
        "1_0",
        ".5",
        "true",
        "1.",
    ],
)
def test_a_text_that_looks_like_something_else_is_written_as_a_text(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    config = load_config(path, [f"logging.wandb_entity='{text}'"])
    assert config.logging.wandb_entity == text
    written = resolved_yaml(config)
    path.write_text(written)
    assert load_config(path) == config
    assert yaml.safe_load(written)["logging"]["wandb_entity"] == text  # and for whoever reads YAML 1.1


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (LAUGHS, 4, ": more than 5000 entries, once aliases are written out."),
        (MERGED_LAUGHS, 5, ": more than 5000 entries, once aliases are written out."),
        ("".join(f"k{i}: {i}\n" for i in range(MAX_ENTRIES)), MAX_ENTRIES, ": more than 5000 entries."),
        ("a:\n  " + "[" * 2000, 2, ": nested more than 32 levels deep."),
        ("- " * 2000, 1, ": nested more than 32 levels deep."),
        ("? " * 2000, 1, ": nested more than 32 levels deep."),
        ("a: " + "1" * 401, 1, "a: a number of 401 digits."),
        ("b: 1\na: &a\n  c: *a\n", 2, ": not valid YAML: `a.c` contains itself."),
        ("a: &a [1, *a]", 1, ": not valid YAML: `a` contains itself."),
        ("a: &a\n  <<: *a\n", 1, ": not valid YAML: `a` contains itself."),
        ("a: 1\n---\nb: 2\n", 2, ": another document begins here (`---`), and one is read."),
        ("a: {b: 1\nc: [2\n", 2, ": not valid YAML: expected ',' or '}', but got ':', in what line 1 begins."),
        ("a: *b", 1, ": not valid YAML: found undefined alias 'b'."),
        ("a: &x 1\nb: &x 2", 2, ": not valid YAML: found duplicate anchor 'x'; first occurrence."),
    ],
)  # fmt: skip
def test_what_explodes_is_refused_at_once(text, line, message):
    start = time.process_time()
    assert fault(text) == (line, message)
    assert time.process_time() - start < 10  # unbounded, the first would take longer than the universe


def test_what_is_within_bounds_is_read():
    deep = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert read_yaml(f"a: {deep}").faults == []
    assert fault(f"a: [{deep}]")[1] == ": nested more than 32 levels deep."
    assert len(read_yaml("".join(f"k{i}: {i}\n" for i in range(MAX_ENTRIES - 1))).value) == MAX_ENTRIES - 1
    assert read_yaml("9" * MAX_DIGITS).value == int("9" * MAX_DIGITS)
    shared = read_yaml("a: &a [1, 2]\nb: [*a, *a]\n")
    assert shared.value == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


# -- tags, keys, characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tagged",
    ["!!python/object:os.system {}", "!!python/name:os.system", "!!timestamp 2001-01-01", "!!binary aGk=", "!!set {a}",
     "!!omap [a: 1]", "!!pairs [a: 1]", "!mine 1", "!<x> 1", "!!value =", "!!merge x"],
)  # fmt: skip
def test_a_tag_beyond_the_core_schema_is_refused(tagged):
    document = read_yaml(f"a: 1\nb: {tagged}\nc: 2\n")
    assert document.value == {"a": 1, "c": 2}  # the rest is read, to find what else is wrong
    (found,) = document.faults
    assert (found.line, found.path) == (2, ("b",))
    assert "is not read here" in found.message


@pytest.mark.parametrize("tagged", ['!!int ""', "!!int x", "!!bool maybe", "!!float 1:30", "!!null x", "!!int 1.5"])
def test_a_tag_that_its_scalar_does_not_bear_is_refused(tagged):
    line, message = fault(f"a: 1\nb: {tagged}\n")
    assert line == 2 and message.startswith("b: ") and "is no `!!" in message


def test_all_faults_of_a_text_come_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        VALID + 'seed: !!int ""\ndata: {num_workers: !!set {a}}\ntraining:\n  ? [a]\n  : 1\n  batch_size: x\n'
    )
    assert [(message.split(":")[1], message.split(": ")[1]) for message in messages(path)] == [
        ("3", "seed"), ("4", "data.num_workers"), ("6", "training"), ("8", "training.batch_size"),
    ]  # fmt: skip


def test_repeated_keys_of_an_override_are_told(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    (message,) = messages(path, "reward.metrics={structure: 1, structure: 2}")
    assert "reward.metrics.structure: the key is there twice" in message


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: \0", 2, ": not valid YAML: it holds the control character U+0000."),
        ("a: 1\nb: \x1b[31m", 2, ": not valid YAML: it holds the control character U+001B."),
        ("b: 1\na: '\x07'", 2, ": not valid YAML: it holds the control character U+0007."),
        ('b: 1\na: "x\\0y"', 2, "a: holds the control character U+0000."),
        ('b: 1\na: "\\x1b"', 2, "a: holds the control character U+001B."),
        ('b: 1\na: "\\ud800"', 2, "a: holds half a surrogate pair U+D800."),
        ('b: 1\na: "\\UFFFFFFFF"', 2, ": not valid YAML: an escape beyond Unicode."),
        ('b: 1\na: "\\q"', 2, ": not valid YAML: found unknown escape character 'q'."),
    ],
)
def test_control_characters_are_named_with_their_line(text, line, message):
    assert fault(text) == (line, message)


def test_other_characters_are_text():
    text = "a: Größe 你好 🎨\n\"b\": 'tab\there'\n"
    assert read_yaml(text).value == {"a": "Größe 你好 🎨", "b": "tab\there"}


def test_merges_are_laid_under_and_the_earlier_wins():
    document = read_yaml("a: &a {x: 1, y: 1}\nb: &b {x: 2, z: {p: 2}}\nc:\n  z: 9\n  <<: [*a, *b]\n  y: 3\n")
    assert document.value["c"] == {"x": 1, "y": 3, "z": 9}
    assert [document.lines["c", name] for name in "xyz"] == [1, 6, 4] and ("c", "z", "p") not in document.lines
    assert fault("a: {<<: 3}") == (1, "a.<<: `<<` takes a mapping or a list of mappings.")


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("seed: 1\n".encode("utf-16"), "run.yaml: is UTF-16. Save it as UTF-8."),
        ("seed: 1\n".encode("utf-32"), "run.yaml: is UTF-32. Save it as UTF-8."),
        (b"seed: 1\nb: caf\xe9\n", "run.yaml:2: is not UTF-8: byte 0xe9 at offset 14."),
        (b"#" * (MAX_BYTES + 1), "run.yaml: has over 128 KiB, which is no configuration."),
    ],
)  # fmt: skip
def test_files_that_are_no_text_of_a_configuration(tmp_path, data, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    assert expected in messages(path)[0]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + VALID, encoding="utf-8")
    assert load_config(path).model.name == "tiny"


def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, kind in (
        (tmp_path / "pipe.yaml", "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path, "a folder"),
    ):
        assert messages(path) == [f"{path}: is {kind}, not a file. Name a YAML file."]


def test_paths_that_no_file_system_has(tmp_path):
    assert re.search(r"cannot be read: .*embedded null (byte|character)", messages("a\0b.yaml")[0])
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    long = "x" * 256
    found = messages(path, f"output_dir={long}", "data.prompts_file=~nobody-of-this-name/x")
    assert "output_dir: " in found[0] and "No file system takes a name of over 255 bytes" in found[0]
    assert "There is no home folder of ~nobody-of-this-name." in found[1]
    assert load_config(path, [f"output_dir={'x' * 255}"]).output_dir == Path("x" * 255)


@pytest.mark.parametrize("name", ["x" * 256, "y/" * 2500])
@pytest.mark.parametrize(
    "key", ["model.name", "model.taesd", "checkpoint.resume_from", "reward.options.clip_score.clip_name"]
)
def test_names_that_may_be_paths_are_held_to_their_limits(tmp_path, key, name):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    (message,) = messages(path, f"{key}={name}")
    assert f": {key}: '" in message and message.endswith("of over 255 bytes, or a path of over 4095.")


def test_what_a_mapping_takes_is_told_of_its_entries(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    key = "reward.options.text_accuracy"
    (message,) = messages(path, f"{key}.languages=[ru]", f"{key}.model_files={{ru: 3}}")
    assert message.endswith(f"{key}.model_files.ru: 3 is not allowed; allowed: mapping of language to file.")
