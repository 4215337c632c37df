"""Folders of steps that a run does again move aside, and none is lost."""

from __future__ import annotations

from pathlib import Path

from glm_training.utils.step_folders import keep_folders_until, step_folders


def filled(root: Path, *steps: int, text: str = "") -> Path:
    for step in steps:
        (root / f"step-{step:06d}").mkdir(parents=True)
        (root / f"step-{step:06d}" / "0.png").write_text(text)
    return root


def test_later_steps_move_aside_as_often_as_it_takes(tmp_path):
    root = filled(tmp_path / "samples", 0, 2, 4, text="one")
    (root / "step-000008").write_text("a file")
    keep_folders_until(root, 2)
    keep_folders_until(filled(root, 4, text="two"), 2)
    assert [step for step, _ in step_folders(root)] == [0, 2] and (root / "step-000008").is_file()
    aside = tmp_path / "samples.discarded"
    assert {path.name: (path / "0.png").read_text() for path in aside.iterdir()} == {
        "step-000004": "one",
        "step-000004.2": "two",
    }


def test_a_folder_that_is_a_link_moves_where_it_lies(tmp_path):
    """A rename does not reach another disk."""
    filled(tmp_path / "disk" / "pictures", 3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").symlink_to(tmp_path / "disk" / "pictures")
    keep_folders_until(tmp_path / "run" / "samples", 1)
    assert (tmp_path / "disk" / "pictures.discarded" / "step-000003" / "0.png").is_file()


def test_nothing_to_move_makes_nothing(tmp_path):
    keep_folders_until(tmp_path / "samples", -1)
    keep_folders_until(filled(tmp_path / "rollouts", 1), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rollouts"]
