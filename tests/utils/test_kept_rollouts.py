"""Kept samples on disk: whole or not at all, within their bound, and read back as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from glm_training.utils.kept_rollouts import KeptRollout, RolloutFolder, least_missed
from glm_training.utils.step_folders import keep_folders_until, step_folder


def kept(step: int = 1, prompts: int = 2) -> KeptRollout:
    rows = prompts * 2 * 3
    names = [f'<b>"{i}"\n' for i in range(prompts)]
    scores = {"total": [float(row) for row in range(rows)], "x": [None] * rows}
    return KeptRollout(step, 8, names, 2, 3, scores, [0.5] * (prompts * 2), [-0.5] * rows)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (row * 20, 0, 0)) for row in range(count)]


def size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step-*"))


def test_a_step_is_read_back_as_it_was_with_a_picture_per_row(tmp_path):
    RolloutFolder(tmp_path, 1 << 20).write(kept(), pictures(12))
    folder = step_folder(tmp_path, 1)
    assert KeptRollout.read(folder) == kept()
    assert kept().names[:4] == ["0-0-0.jpg", "0-0-1.jpg", "0-0-2.jpg", "0-1-0.jpg"]
    reds = [Image.open(folder / name).getpixel((4, 4))[0] for name in kept().names]
    assert all(abs(red - row * 20) < 8 for row, red in enumerate(reds))


def test_a_step_that_is_done_again_takes_the_place_of_the_first(tmp_path):
    folder = RolloutFolder(tmp_path, 1 << 20)
    folder.write(kept(), pictures(12))
    folder.write(kept(prompts=1), pictures(6))
    assert len(KeptRollout.read(step_folder(tmp_path, 1)).prompts) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_is_kept_stays_within_its_bound_and_over_the_whole_run(tmp_path):
    RolloutFolder(tmp_path / "one", 1 << 30).write(kept(), pictures(12))
    limit = 4 * size(tmp_path / "one") + 1000
    folder = RolloutFolder(tmp_path / "many", limit)
    for step in range(1, 33):
        folder.write(kept(step), pictures(12))
        assert size(tmp_path / "many") <= limit
    left = steps(tmp_path / "many")
    assert left[0] == 1 and left[-1] == 32 and len(left) == 4


def test_what_was_discarded_counts_and_goes_first_and_the_oldest_before_others(tmp_path):
    root, aside = tmp_path / "rollouts", tmp_path / "rollouts.discarded"
    for step in (1, 2, 3, 4):
        RolloutFolder(root, 1 << 30).write(kept(step), pictures(12))
    limit = size(tmp_path) + 100
    keep_folders_until(root, 1)
    for age, step in enumerate((3, 2, 4)):  # as written one after another
        os.utime(aside / f"step-{step:06d}", ns=(age, age))
    (aside / "notes.txt").write_text("mine")
    folder = RolloutFolder(root, limit)
    for step, left in ((2, [2, 4]), (3, [4]), (4, [])):
        folder.write(kept(step), pictures(12))
        assert size(tmp_path) <= limit
        assert steps(aside) == left and steps(root) == list(range(1, step + 1))
    folder.write(kept(5), pictures(12))
    assert steps(root) == [1, 3, 4, 5]
    assert (aside / "notes.txt").read_text() == "mine"


def test_what_a_killed_write_has_left_goes_with_the_next_one(tmp_path):
    torn = tmp_path / ".step-000001.new"
    torn.mkdir()
    (torn / "0-0-0.jpg").write_bytes(b"x" * 5000)
    RolloutFolder(tmp_path, 1 << 20).write(kept(2), pictures(12))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_bound_that_takes_not_even_one_step_keeps_none(tmp_path):
    RolloutFolder(tmp_path, 10).write(kept(), pictures(12))
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "gone"), [([5], 5), ([1, 9], 1), ([1, 2, 9], 2), ([1, 4, 5, 6, 20], 5), ([0, 10, 20, 30], 10)]
)
def test_the_step_between_the_nearest_neighbours_goes_first(steps, gone):
    assert least_missed(steps) == gone


@pytest.mark.parametrize(
    "change", [{"scores": {"total": [1.0]}}, {"prompts": 3}, {"plan_advantages": [0.1]}, {"step": "1"}]
)
def test_what_is_no_kept_step_is_an_error(tmp_path, change):
    RolloutFolder(tmp_path, 1 << 20).write(kept(), pictures(12))
    path = step_folder(tmp_path, 1) / "rollout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="rollout.json"):
        KeptRollout.read(path.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "a", [1], 1e308])
@pytest.mark.parametrize("place", ["scores", "plan_advantages"])
def test_values_that_no_page_can_show_are_none_of_a_run(tmp_path, place, value):
    RolloutFolder(tmp_path, 1 << 20).write(kept(), pictures(12))
    file = step_folder(tmp_path, 1) / "rollout.json"
    content = json.loads(file.read_text())
    (content["scores"]["total"] if place == "scores" else content[place])[0] = value
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="finite value"):
        KeptRollout.read(file.parent)
