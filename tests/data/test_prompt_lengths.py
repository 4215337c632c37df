"""Prompts that a model cuts are told of with their line; those that it cannot take are faults of their line."""

import json
from dataclasses import dataclass

import pytest

from glm_training.data import DataError
from glm_training.data.preference.scan import load_pairs

LIMIT = 9


@dataclass(frozen=True)
class Reading:
    fault: tuple[str, str] | None = None
    cut: str | None = None
    read: object = None


def reader(prompts):
    """Reads nine characters, and none of what speaks of a dog."""
    assert len(set(prompts)) == len(prompts)
    return [
        Reading(fault=("no dogs", "Write of a cat")) if "dog" in prompt
        else Reading(cut=f"{len(prompt)} characters", read=prompt[:LIMIT]) if len(prompt) > LIMIT
        else Reading()
        for prompt in prompts
    ]  # fmt: skip


def test_what_fits_is_not_spoken_of(files) -> None:
    assert files.scan(reader=reader).remarks == []


def test_the_first_cut_prompts_are_named_with_their_line_and_all_are_counted(files) -> None:
    files.prompts.write_text("a thing 0 a\nshort\na thing 2 b\na thing 2 c\n", encoding="utf-8")
    (remark,) = files.scan(reader=reader).remarks
    path = files.prompts
    assert remark == (
        f"the model does not read all of 3 of 4 prompts in {path}, and 2 of them differ only in what it does not read: "
        f"{path}:1: 11 characters; {path}:3: 11 characters; {path}:4: 11 characters. "
        "Put what matters first, or shorten them"
    )


def test_past_three_only_a_count(files) -> None:
    files.prompts.write_text("".join(f"{i} is a long prompt\n" for i in range(4)), encoding="utf-8")
    (remark,) = files.scan(reader=reader).remarks
    assert "prompts.txt:3: 18 characters; and 1 more. " in remark and "differ only" not in remark


def test_a_prompt_that_cannot_be_taken_is_a_fault_of_its_line(files) -> None:
    files.prompts.write_text("a cat\na dog\na cat\na cat\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts.txt:2: no dogs. Write of a cat.") as caught:
        files.scan(reader=reader)
    assert len(caught.value.problems) == 1
    assert [example.index for example in files.scan(reader=reader, max_bad_fraction=0.25).examples] == [0, 2, 3]


def test_pairs_have_their_line_in_the_list(files) -> None:
    rows = [
        {"prompt": prompt, "preferred": "target_images/0.png", "rejected": "target_images/1.png"}
        for prompt in ("a cat", "a very long cat", "a very long fox", "a dog")
    ]
    path = files.root / "pairs.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    report = load_pairs(path, reader=reader, max_bad_fraction=0.25)
    assert len(report.pairs) == 3 and "no dogs" in str(report.quarantined[0])
    assert f"{path}:17: no dogs" in str(report.quarantined[0])
    assert f"{path}:7: 15 characters; {path}:12: 15 characters. " in report.remarks[0]
