"""The checkpoint of the best evaluation: saved when it is found, named, kept past the limit, and found by a resume."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from glm_training.checkpoint import disk
from glm_training.checkpoint.best import Best, read_best
from glm_training.checkpoint.commit import checkpoint_name
from glm_training.checkpoint.manifest import verify_checkpoint
from glm_training.engine.best import BestCheckpoint, judged
from glm_training.engine.errors import TrainingError
from glm_training.engine.evaluations import Evaluations
from glm_training.engine.run_directory import chosen_point
from glm_training.trainers.base_trainer import BaseTrainer
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

KEYS = [
    "model.component=dit",
    "reward.grpo.num_samples=2",
    "lora.enabled=true",
    "checkpoint.save_lora_only=true",
    "evaluation.enabled=true",
    "evaluation.num_eval_samples=1",
    "training.max_steps=6",
    "logging.eval_interval=1",
    "logging.save_interval=3",
    "checkpoint.save_total_limit=1",
]
SCORES = [0.9, 0.2, 0.5, 0.4, 0.5, 0.3, 0.6]
"""Of the evaluation after each step; the first one is before the training."""


@pytest.fixture
def scored(monkeypatch):
    """Evaluations log these totals by step."""
    scores = dict(enumerate(SCORES))
    figures = Evaluations.figures

    def scripted(self, found):
        step = self.lines_step
        return {**figures(self, found), "eval/total": scores[step]}

    run = Evaluations.run

    def noticed(self, step, *rest):
        self.lines_step = step
        return run(self, step, *rest)

    monkeypatch.setattr(Evaluations, "run", noticed)
    monkeypatch.setattr(Evaluations, "figures", scripted)
    return scores


def trainer(folder: Path, *keys: str, resume: str | None = None) -> BaseTrainer:
    found = trainer_of(folder, *KEYS, *keys, *([] if resume is None else [f"checkpoint.resume_from={resume}"]))
    found.resume = chosen_point(found.config)
    return found


def kept(folder: Path) -> list[int]:
    checkpoints = folder / "run" / "checkpoints"
    steps = sorted(checkpoints.glob("step-*"))
    for path in steps:
        verify_checkpoint(path)
    return [int(path.name.removeprefix("step-")) for path in steps]


def best_of(folder: Path) -> Best | None:
    return read_best(folder / "run" / "checkpoints")


def test_a_better_evaluation_is_saved_and_kept(tmp_path, scored, capsys):
    """Steps 1, 2 and 6 are better than all before them (4 is as good as 2), 3 and 6 are saved anyway."""
    saves: list[int] = []
    run = trainer(tmp_path)
    save = run.save
    run.save = lambda: (saves.append(run.step), save())
    run.train()
    assert saves == [1, 2, 3, 6] and kept(tmp_path) == [2, 6]
    expected = Best("step-000006", 6, "eval/total", 0.6, higher_is_better=True)
    assert best_of(tmp_path) == expected
    told = f"best checkpoint: step 6, eval/total 0.6 (higher is better): {tmp_path}/run/checkpoints/step-000006"
    assert told in capsys.readouterr().out.splitlines()


def test_the_best_outlives_the_limit_and_a_resume(tmp_path, scored):
    trainer(tmp_path, "training.max_steps=5").train()
    assert best_of(tmp_path).step == 2 and kept(tmp_path) == [2, 5]
    again = trainer(tmp_path, resume="latest")
    again.train()
    assert best_of(tmp_path).step == 6 and kept(tmp_path) == [2, 6]


def test_what_lies_behind_the_step_gone_back_to_counts_no_more(tmp_path, scored):
    trainer(tmp_path, "checkpoint.save_total_limit=10").train()
    assert best_of(tmp_path).step == 6 and kept(tmp_path) == [1, 2, 3, 6]
    scored.update({4: 0.55, 5: 0.1, 6: 0.1})
    checkpoint = f"{tmp_path}/run/checkpoints/step-000003"
    trainer(tmp_path, "training.max_steps=5", "checkpoint.save_total_limit=10", resume=checkpoint).train()
    assert best_of(tmp_path) == Best("step-000004", 4, "eval/total", 0.55, higher_is_better=True)
    # gone back once more: of what is there, step 2 is the best, as it was
    trainer(tmp_path, "training.max_steps=3", "checkpoint.save_total_limit=10", resume=checkpoint).train()
    assert best_of(tmp_path).step == 2


def test_a_best_that_was_deleted_gives_way_to_the_next_that_is_there(tmp_path, scored):
    trainer(tmp_path, "training.max_steps=3", "checkpoint.save_total_limit=10").train()
    best = tmp_path / "run" / "checkpoints" / "step-000002"
    best.rename(tmp_path / "elsewhere")
    trainer(tmp_path, "training.max_steps=4", "checkpoint.save_total_limit=10", resume="latest").train()
    assert best_of(tmp_path).step == 4, "0.5 is better than step 3's 0.4"


def test_a_kill_between_the_save_and_the_pointer_is_made_good(tmp_path, scored, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(self, best):
        raise Killed

    run = trainer(tmp_path, "training.max_steps=2")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BestCheckpoint, "name", killed)
        run.train()
    assert best_of(tmp_path) is None and kept(tmp_path) == [1]
    trainer(tmp_path, "training.max_steps=1", resume="latest").train()
    assert best_of(tmp_path) == Best("step-000001", 1, "eval/total", 0.2, higher_is_better=True)


def test_a_log_that_is_lost_does_not_lose_the_best(tmp_path, scored):
    trainer(tmp_path, "training.max_steps=3").train()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    trainer(tmp_path, "training.max_steps=4", resume="latest").train()
    assert best_of(tmp_path).step == 2 and kept(tmp_path) == [2, 4]


def test_scores_under_other_settings_do_not_compete(tmp_path, scored):
    trainer(tmp_path, "training.max_steps=3").train()
    accept = ["evaluation.seed=77", "resume.accept=[evaluation]"]
    trainer(tmp_path, "training.max_steps=4", *accept, resume="latest").train()
    assert best_of(tmp_path).step == 4, "of 3 and 4, though 2 has the same score"
    trainer(tmp_path, "training.max_steps=5", *accept, resume="latest").train()
    assert best_of(tmp_path).step == 4


def test_it_can_be_switched_off(tmp_path, scored):
    trainer(tmp_path, "checkpoint.keep_best=false").train()
    assert best_of(tmp_path) is None and kept(tmp_path) == [6]
    trainer(tmp_path / "other", "evaluation.enabled=false").train()
    assert best_of(tmp_path / "other") is None and kept(tmp_path / "other") == [6]


@pytest.fixture
def pointer_refused(monkeypatch):
    """The disk does not take the file `best` so many times."""
    rename, left = disk.rename, [0]

    def full(source: Path, target: Path) -> None:
        if target.name == "best" and left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(disk, "rename", full)
    return left


def test_a_disk_that_does_not_take_the_pointer_ends_no_run(tmp_path, scored, pointer_refused, monkeypatch, caplog):
    """Step 2 cannot be named after its evaluation; the save after step 3 names it first, and does not remove it."""
    run = trainer(tmp_path, "training.max_steps=3")
    name = run.best.name

    def unnamed(best: Best) -> None:
        pointer_refused[0] = best.step == 2
        name(best)
        assert best_of(tmp_path).step == 1

    monkeypatch.setattr(run.best, "name", unnamed)
    assert run.train().step == 3
    assert kept(tmp_path) == [2, 3] and best_of(tmp_path).step == 2
    told = "naming the best checkpoint failed and the run goes on; the next save tries again: SaveError: "
    assert caplog.text.count(told) == 1 and "best, which tells the best checkpoint, of step 2, cannot be" in caplog.text


def test_a_save_waits_for_the_pointer(tmp_path, scored, pointer_refused):
    """It would remove what nothing names: it fails, and nothing is removed."""
    pointer_refused[0] = 99
    with pytest.raises(TrainingError, match="best checkpoint, of step 1, cannot be written: No space left.* Free some"):
        trainer(tmp_path).train()
    assert kept(tmp_path) == [1] and best_of(tmp_path) is None
    pointer_refused[0] = 0
    trainer(tmp_path, "training.max_steps=1", resume="latest").train()
    assert best_of(tmp_path).step == 1


def test_the_end_of_a_run_tries_once_more(tmp_path, scored, pointer_refused):
    pointer_refused[0] = 1
    trainer(tmp_path, "training.max_steps=1").train()
    assert best_of(tmp_path).step == 1


# -- what decides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("figures", "rewarded", "expected"),
    [
        ({"eval/total": 0.5, "eval/ar/loss": 2.0}, True, ("eval/total", 0.5, True)),
        ({"eval/total": 0.5, "eval/ar/loss": 2.0}, False, ("eval/ar/loss", 2.0, False)),
        ({"eval/dit/loss": 0.25, "eval/ar/loss": 2.0, "dit/loss": 9.0}, False,
         ("eval/ar/loss + eval/dit/loss", 2.25, False)),
        ({"eval/generator/loss": 1.5}, False, ("eval/generator/loss", 1.5, False)),
        ({"eval/autoencoder/psnr": 21.0, "eval/autoencoder/psnr_over_flat": 3.0}, False,
         ("eval/autoencoder/psnr", 21.0, True)),
        ({"eval/unet/loss": 0.5, "eval/unet/accuracy": 0.9}, False, ("eval/unet/loss", 0.5, False)),
        ({"eval/total": 0.5, "eval/objects": 1.0}, False, ("eval/total", 0.5, True)),
        ({"eval/ar/loss": 2.0}, True, ("eval/ar/loss", 2.0, False)),
        ({"eval/total": None}, True, None),
        ({"eval/total": float("nan")}, True, None),
        ({"eval/dit/loss": None, "eval/ar/loss": 2.0}, False, None),
        ({"eval/objects": 1.0, "loss": 3.0}, True, None),
        ({}, False, None),
    ],
)  # fmt: skip
def test_the_figure_that_decides(figures, rewarded, expected):
    found = judged(7, figures, rewarded)
    if expected is None:
        assert found is None
    else:
        assert found == Best(checkpoint_name(7), 7, expected[0], expected[1], higher_is_better=expected[2])


def test_lower_losses_and_the_first_of_equal_ones_win(tmp_path):
    best = BestCheckpoint(config_of(tmp_path, "evaluation.enabled=true", "reward.enabled=false"), World())
    taken = []
    for step, loss in enumerate([3.0, 4.0, 2.0, 2.0, 1.5, float("nan"), 2.5], start=1):
        found = best.improved_by(step, {"eval/ar/loss": loss, "eval/dit/loss": 1.0})
        if found is not None:
            taken.append((step, found.score))
            best.best = found
    assert taken == [(1, 4.0), (3, 3.0), (5, 2.5)]
