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


def told_while_running(times: list[float], done: list[int], prompts: int, monkeypatch, totals=None) -> list[str]:
    """The lines of an evaluation of `prompts` x 4 that began at 0 and has `done` so many prompts at these `times`."""
    lines: list[str] = []
    clock = iter([0.0, *times])
    monkeypatch.setattr(evaluations.time, "monotonic", lambda: next(clock))
    running = evaluations.Running(lines.append, prompts, 4)
    for place, finished in enumerate(done):
        running.scored(finished, None if totals is None else totals[place])
    return lines


def test_an_evaluation_tells_after_its_first_pictures_and_then_once_a_quarter(monkeypatch):
    """104 prompts, 8 at once, 3 s each: after 8, and after further 26 or more."""
    done = [*range(8, 104, 8), 104]
    lines = told_while_running([3.0 * place for place in range(1, 14)], done, 104, monkeypatch)
    assert lines == [f"evaluating: {images} of 416 images" for images in (32, 160, 288)]


def test_a_short_evaluation_tells_nothing_and_a_fast_one_little(monkeypatch):
    assert told_while_running([5.0], [8], 8, monkeypatch) == []
    assert told_while_running([0.4, 0.8, 1.2, 1.6], [8, 16, 24, 32], 40, monkeypatch) == []
    # each quarter takes 1 s: every second one is told
    fast = told_while_running([1.0, 2.0, 3.0, 4.0], [10, 20, 30, 40], 40, monkeypatch)
    assert fast == ["evaluating: 80 of 160 images"]


def test_the_reward_so_far_is_that_of_all_pictures_which_have_one(monkeypatch):
    totals = [torch.tensor([0.5, 0.25]), torch.tensor([0.75, float("nan")])]
    lines = told_while_running([3.0, 6.0], [4, 8], 16, monkeypatch, totals)
    assert lines == [
        f"evaluating: {images} of 64 images, reward {mean} so far" for images, mean in ((16, 0.375), (32, "0.500"))
    ]


def test_pictures_of_several_sizes_are_counted_together(monkeypatch):
    lines: list[str] = []
    clock = iter([0.0, 3.0, 6.0])
    monkeypatch.setattr(evaluations.time, "monotonic", lambda: next(clock))
    running = evaluations.Running(lines.append, 12, 1)
    running.scored(4, None)
    running.finished(4)
    running.scored(4, None)
    assert lines == ["evaluating: 4 of 12 images", "evaluating: 8 of 12 images"]


def test_a_run_tells_how_far_its_evaluation_is_and_its_reward_so_far(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluations.Running, "PAUSE", 0.0)
    monkeypatch.setattr(held_out, "IMAGES_AT_ONCE", 2)
    trainer = trainer_of(tmp_path, *SMALL, "evaluation.num_eval_samples=4", "evaluation.samples_per_prompt=2")
    trainer.evaluations.run(0, {}, SimpleNamespace(images=lambda *_: None), lambda: None, lambda: False)
    totals = trainer.evaluations.before.scores["total"]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluating")]
    means = [f"{totals[: place + 1].mean().item():.3f}" for place in range(3)]
    assert told == [
        f"evaluating: {2 * place + 2} of 8 images, reward {mean} so far" for place, mean in enumerate(means)
    ]
    assert max(map(len, told)) <= 80
