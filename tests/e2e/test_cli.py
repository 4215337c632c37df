"""The command line as a user meets it: exit codes, errors all at once, stop and resume."""

from __future__ import annotations

import signal

from tests.runs import write_config
from tests.warm import Program, run


def test_a_faulty_file_exits_2_with_every_problem_and_its_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  nmae: tiny\ntraining:\n  batch_size: none\n  batch_size: 2\n")
    done = run("train.py", "--config", str(path), "training.max_stepz=3")
    assert done.returncode == 2
    for part in ("bad.yaml:2", "model.nmae", "name", "bad.yaml:5", "max_stepz", "max_steps"):
        assert part in done.stderr, (part, done.stderr)
    assert "Traceback" not in done.stderr


def test_faulty_data_exits_2_before_a_model_is_loaded(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "data" / "target_images" / "1.png").unlink()
    (tmp_path / "data" / "target_images" / "2.png").write_bytes(b"no image")
    done = run("train.py", "--config", str(path))
    assert done.returncode == 2
    assert "prompts.txt:2" in done.stderr and "2.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_had_exits_2_with_the_remedy(tmp_path):
    done = run("train.py", "--config", str(write_config(tmp_path)), "model.name=nobody/nothing")
    assert done.returncode == 2
    assert "nobody/nothing" in done.stderr and "Traceback" not in done.stderr


def test_missing_reward_weights_exit_2_and_name_the_file(tmp_path):
    words = ["train.py", "--config", str(write_config(tmp_path)), "reward.metrics={lpips: 1.0}"]
    done = run(*words, changes={"TORCH_HOME": str(tmp_path / "torch")})
    assert done.returncode == 2
    assert "alexnet" in done.stderr and "backbone_weights" in done.stderr


def test_validate(tmp_path):
    done = run("-m", "glm_training.cli.main", "validate", "--config", str(write_config(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert "4 training prompts" in done.stdout


def test_an_interrupt_saves_exits_130_and_resumes(tmp_path):
    path = write_config(tmp_path)
    program = Program("train.py", "--config", str(path), "training.max_steps=200")
    program.until(lambda: "\nstep 2/" in program.stdout())
    program.send_signal(signal.SIGINT)
    assert program.ended().returncode == 130
    saved = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    step = int(saved.removeprefix("step-"))
    assert 2 <= step < 200
    done = run("train.py", "--config", str(path), "--resume", f"training.max_steps={step + 1}")
    assert done.returncode == 0, done.stderr
    assert f"step {step + 1}/{step + 1}" in done.stdout


def test_resuming_under_other_settings_is_refused_with_a_diff(tmp_path):
    path = write_config(tmp_path)
    assert run("train.py", "--config", str(path)).returncode == 0
    changed = ["training.max_steps=3", "reward.grpo.kl_coef=0.5"]
    done = run("train.py", "--config", str(path), "--resume", "latest", *changed)
    assert done.returncode == 2
    assert "reward.grpo.kl_coef: 0.05 -> 0.5" in done.stderr and "resume.accept" in done.stderr
