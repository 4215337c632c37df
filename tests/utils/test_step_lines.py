"""Files of lines by step, also after a kill in the middle of a line."""

import json

from glm_training.utils.step_lines import has_step, keep_until


def line(step: int, **values: object) -> bytes:
    return json.dumps({"step": step, **values}, ensure_ascii=False).encode() + b"\n"


def test_a_torn_line_is_set_aside_and_counts_as_no_step(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    whole = [line(step, scores={}) for step in (0, 4)]
    torn = line(8, prompt="ü")[:-4]  # in the middle of a letter
    path.write_bytes(b"".join(whole) + torn)
    assert has_step(path, 4) and not has_step(path, 8)
    keep_until(path, 8)
    assert path.read_bytes() == b"".join(whole)
    assert (tmp_path / "evaluations.discarded.jsonl").read_bytes() == torn + b"\n"
    keep_until(path, 0)
    assert path.read_bytes() == whole[0]
    assert (tmp_path / "evaluations.discarded.jsonl").read_bytes() == torn + b"\n" + whole[1]


def test_what_separates_lines_for_python_alone_separates_none_here(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_bytes(line(0, prompts=["one\u2028two\u0085three"]))
    keep_until(path, 3)
    assert has_step(path, 0) and not (tmp_path / "evaluations.discarded.jsonl").exists()


def test_what_is_no_record_is_set_aside(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_bytes(b"5\n{}\n" + line(1))
    assert not has_step(path, 5)
    keep_until(path, 1)
    assert path.read_bytes() == line(1)


def test_a_key_may_be_asked_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(2, loss=1.0) + line(4, **{"eval/loss": 1.0}))
    assert has_step(path, 4, prefix="eval/") and not has_step(path, 2, prefix="eval/")
