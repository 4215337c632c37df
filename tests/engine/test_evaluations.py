"""Which scores are compared, what a checkpoint keeps of them, and who draws what in several processes."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from glm_training.checkpoint.resume import load_checkpoint
from glm_training.engine import evaluations
from glm_training.evaluation import held_out
from glm_training.rewards import RewardOptions, RewardResult
from glm_training.utils.distributed import World
from tests.runs import trainer_of

SMALL = [
    "model.component=dit",
    "training.batch_size=1",
    "reward.grpo.num_samples=2",
    "evaluation.enabled=true",
    "logging.eval_interval=1",
    "logging.num_log_images=1",
    "logging.log_images=true",
]


@pytest.fixture
def finished_step(tmp_path):
    """A run of one step, evaluated at 0 and 1."""
    trainer_of(tmp_path, *SMALL, "training.max_steps=1").train()
    return tmp_path


def steps_of(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "run" / "evaluations.jsonl").read_text().splitlines()]


def resumed(folder, *overrides: str):
    return trainer_of(folder, *SMALL, "training.max_steps=2", "checkpoint.resume_from=latest", *overrides)


def test_pictures_are_scored_without_dropout_and_as_many_are_kept_as_asked(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, *SMALL, "logging.num_log_images=2")
    trainer.family.train()
    modes, real = [], evaluations.evaluate

    def seen(family, *arguments, **options):
        modes.append(family.component("dit").training)
        return real(family, *arguments, **options)

    monkeypatch.setattr(evaluations, "evaluate", seen)
    trainer.train()
    assert modes and not any(modes)
    assert tuple(trainer.evaluations.before.images.shape) == (2, 3, 64, 64)


def test_a_checkpoint_keeps_the_shown_pictures_in_eight_bits(finished_step):
    path = finished_step / "run" / "checkpoints" / "step-000001"
    before = load_checkpoint(path)["trainer"]["before"]
    assert before["images"].dtype == torch.uint8 and tuple(before["images"].shape) == (1, 3, 64, 64)
    assert len(before["scores"]["total"]) == 2
    trainer = resumed(finished_step)
    trainer.load(load_checkpoint(path))
    assert trainer.evaluations.before.images.max() <= 1
    assert torch.equal(trainer.evaluations.state()["images"], before["images"])


def test_scores_under_the_same_settings_are_compared_with_the_start(finished_step, capsys):
    result = resumed(finished_step, "logging.num_log_images=2", "rollout.micro_batch_size=1").train()
    assert result.before and result.after
    assert steps_of(finished_step) == [0, 1, 2], "step 1 was evaluated before the resume"
    out = capsys.readouterr().out
    assert "under other settings" not in out and " before " in out


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluation.samples_per_prompt=2", "evaluation.samples_per_prompt: 1 -> 2"),
        ("evaluation.seed=5", "evaluation.seed: 1234 -> 5"),
        ("evaluation.num_eval_samples=3", "evaluation.num_eval_samples: 2 -> 3; prompts and images: "),
    ],
)
def test_scores_under_other_settings_are_taken_anew(finished_step, capsys, override, named):
    trainer = resumed(finished_step, override)
    result = trainer.train()
    out = capsys.readouterr().out
    assert named in out and "taken under other settings" in out and re.search(r"score +step 1 +after", out)
    assert trainer.evaluations.before_step == 1 and steps_of(finished_step) == [0, 1, 1, 2]
    assert result.before.keys() == result.after.keys() == {"total", "structure"}


def test_a_finished_run_has_nothing_to_compare_under_other_settings(finished_step):
    overrides = ["training.max_steps=1", "evaluation.seed=5"]
    result = resumed(finished_step, *overrides).train()
    assert result.before == result.after == {}


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_prompts_and_call_the_hook_equally_often(monkeypatch, world_size):
    prompts = list("abcd")
    drawn, calls = {}, {}

    def draw(family, batch, rows, settings, *, samples, on_step):
        on_step()
        return torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)

    def score(batch):
        return RewardResult(batch.images[:, 0, 0, 0], {})

    monkeypatch.setattr(held_out, "draw", draw)
    batch = SimpleNamespace(prompts=prompts, targets=None, sources=None)
    settings = SimpleNamespace(samples=1)

    def run(rank: int, gathered) -> held_out.Evaluation:
        monkeypatch.setattr(held_out, "gather_tensor", gathered)
        hook = lambda: calls.__setitem__(rank, calls.get(rank, 0) + 1)  # noqa: E731
        calculator = SimpleNamespace(compute_rewards=score, options=RewardOptions(), is_custom=False)
        world = World(rank, world_size)
        return held_out.evaluate(
            None, calculator, batch, settings, world, keep_images=3, prompts_at_once=1, on_step=hook
        )

    for rank in range(world_size):
        drawn[rank] = []
        run(rank, lambda world, rows: drawn[world.rank].append(rows) or rows.new_zeros(99, *rows.shape[1:]))
    pieces = iter([torch.cat([drawn[rank][kind] for rank in range(world_size)]) for kind in (0, 1)])
    whole = run(0, lambda world, rows: next(pieces))
    assert whole.scores["total"].tolist() == [0, 1, 2, 3]
    assert whole.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert calls.pop(0) // 2 == calls[1] and len(set(calls.values())) == 1  # the first process ran twice
