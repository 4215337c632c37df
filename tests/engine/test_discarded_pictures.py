"""Pictures of steps that a run does again are not its own."""

from __future__ import annotations

from tests.engine.test_run_directory import begin, config_of


def test_pictures_of_steps_that_are_done_again_move_aside(tmp_path):
    """Else the page of the run would show them as its own."""
    begin(config_of(tmp_path), saved=3)
    run = tmp_path / "run"
    for name in ("samples", "rollouts"):
        for step in (0, 3, 5):
            (run / name / f"step-{step:06d}").mkdir(parents=True)
    assert begin(config_of(tmp_path, "checkpoint.resume_from=latest")) == 3
    for name in ("samples", "rollouts"):
        assert sorted(path.name for path in (run / name).iterdir()) == ["step-000000", "step-000003"]
        assert [path.name for path in (run / f"{name}.discarded").iterdir()] == ["step-000005"]
