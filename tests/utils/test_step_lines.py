"""Files of lines by step, also after a kill in the middle of a line."""

import errno
import io
import json
import os

import pytest

from glm_training.utils.failures import begin_telling
from glm_training.utils.step_lines import StepLines, keep_until, line_of


def line(step: int, **values: object) -> bytes:
    return json.dumps({"step": step, **values}, ensure_ascii=False).encode() + b"\n"


def test_a_torn_line_is_set_aside_and_counts_as_no_step(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    whole = [line(step, scores={}) for step in (0, 4)]
    torn = line(8, prompt="ü")[:-4]  # in the middle of a letter
    path.write_bytes(b"".join(whole) + torn)
    assert line_of(path, 4) is not None and line_of(path, 8) is None
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
    assert line_of(path, 0) is not None and not (tmp_path / "evaluations.discarded.jsonl").exists()


def test_what_is_no_record_is_set_aside(tmp_path):
    path = tmp_path / "losses.jsonl"
    path.write_bytes(b"5\n{}\n" + line(1))
    assert line_of(path, 5) is None
    keep_until(path, 1)
    assert path.read_bytes() == line(1)


def test_a_key_may_be_asked_for(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(2, loss=1.0) + line(4, **{"eval/loss": 1.0}))
    assert line_of(path, 4, prefix="eval/") is not None and line_of(path, 2, prefix="eval/") is None


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A file that takes `room` bytes in all; a write that does not fit is cut short first, as by a real disk."""
    begin_telling()
    real, state = io.open, {"room": 10**6, "truncates": True}

    class Small(io.FileIO):
        def write(self, data) -> int:
            left = state["room"] - os.fstat(self.fileno()).st_size
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
            return super().write(bytes(data)[:left])

    def opened(file, mode="r", *arguments, **options):
        return Small(file, "a") if mode == "ab" else real(file, mode, *arguments, **options)

    cut = os.truncate

    def truncated(path, length):
        if not state["truncates"]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        cut(path, length)

    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(os, "truncate", truncated)
    return state


@pytest.mark.parametrize("truncates", [True, False], ids=["it can be cut at once", "it can be cut later"])
def test_a_disk_that_is_full_for_a_while_loses_no_line_and_keeps_no_half_one(tmp_path, small_disk, caplog, truncates):
    path = tmp_path / "folder" / "metrics.jsonl"
    lines = StepLines(path)
    lines.append({"step": 1, "note": "ä"})
    small_disk |= {"room": len(line(1, note="ä")) + 5, "truncates": truncates}
    for step in (2, 3):
        lines.append({"step": step})
    if truncates:
        assert path.read_bytes() == line(1, note="ä")
    assert lines.write_waiting() == 2
    small_disk |= {"room": 10**6, "truncates": True}
    lines.append({"step": 4})
    assert path.read_bytes() == line(1, note="ä") + line(2) + line(3) + line(4)
    assert lines.write_waiting() == 0
    assert caplog.text.count("writing metrics.jsonl failed") == 1


def test_a_file_that_was_taken_away_is_begun_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = StepLines(path)
    lines.append({"step": 1})
    path.unlink()
    lines.append({"step": 2})
    assert path.read_bytes() == line(2)


def test_half_a_surrogate_pair_is_written_as_json_writes_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    StepLines(path).append({"step": 1, "file\udc80": 1.0})
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 1, "file\udc80": 1.0}
