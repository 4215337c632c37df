"""What a run says of its rewards: samples without a score, steps that teach nothing, the user's own that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_training.engine.errors import ScoringError
from glm_training.reinforcement.remarks import FLAT_STEPS, FlatSteps
from tests.runs import trainer_of

SHARED = [
    "model.component=dit",
    "training.batch_size=2",
    "reward.grpo.num_samples=2",
    "reward.grpo.gate=false",
    "reward.on_error=skip",
    "logging.save_interval=100",
]


def trainer_with(folder: Path, body: str, *overrides: str):
    """A trainer with a reward of the user's own whose hook has that body."""
    (folder / "own.py").write_text(
        "from glm_training.rewards import RewardCalculator, RewardSampleError\n\n\n"
        "class Own(RewardCalculator):\n"
        "    calls = 0\n\n"
        "    def compute_reward(self, generated_image, target_image, prompt):\n"
        f"        Own.calls += 1\n        {body}\n",
        encoding="utf-8",
    )
    return trainer_of(folder, *SHARED, f"reward.metrics={{'{folder}/own.py:Own': 1.0}}", *overrides)


def log_of(folder: Path) -> str:
    return (folder / "run" / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("resampled", ["0", "2"])
def test_a_step_without_any_score_stops_the_run(tmp_path, resampled):
    trainer = trainer_with(tmp_path, "return None", f"reward.grpo.max_resamples={resampled}")
    with pytest.raises(ScoringError) as caught:
        trainer.train()
    reason = f"Own.compute_reward ({tmp_path}/own.py:7) returned None; it must return a finite number"
    for text in (str(caught.value), log_of(tmp_path)):
        assert "not one of the 4 samples of step 1 has a score (reward.on_error: skip" in text and reason in text
    assert "--resume continues from" in str(caught.value) and "step-000000" in str(caught.value)


def test_why_samples_are_left_out_is_told_once_for_each_reason(tmp_path, capsys):
    """Of the four samples of a step one is left out for the first reason, in the third step one for another."""
    body = "\n        ".join(
        [
            "if Own.calls % 4 == 0:",
            "    raise RewardSampleError(f'no face in {Own.calls}' if Own.calls < 12 else 'two faces')",
            "return Own.calls / 100",
        ]
    )
    trainer_with(tmp_path, body, "training.max_steps=3").train()
    told = [line for line in capsys.readouterr().out.splitlines() if "without a score" in line]
    assert len(told) == 2 and all(line in log_of(tmp_path) for line in told)
    assert told[0].startswith("without a score: 1 of the 4 samples of step 1, left out as")
    assert told[0].count("no face in 4") == 1
    assert told[1].startswith("without a score: 1 of the 4 samples of step 3, left out as") and "two faces" in told[1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward/skipped_samples"] for line in lines] == [1, 1, 1]


def test_a_failing_reward_leaves_its_traceback_in_the_log(tmp_path):
    trainer = trainer_with(tmp_path, "return {}[prompt] if Own.calls > 4 else Own.calls / 100")
    with pytest.raises(ScoringError) as caught:
        trainer.train()
    assert "Own.compute_reward raised KeyError" in str(caught.value)
    assert f"({tmp_path}/own.py:9, in compute_reward: return {{}}[prompt]" in str(caught.value)
    assert "The run stopped after step 1 of 2" in str(caught.value) and "Traceback" not in str(caught.value)
    log = log_of(tmp_path)
    assert "Traceback (most recent call last):" in log and f'"{tmp_path}/own.py", line 9, in compute_reward' in log


def test_steps_that_teach_nothing_are_told_once_with_what_helps(tmp_path, capsys):
    trainer_with(tmp_path, "return 0.25", "training.batch_size=1").train()
    told = [line for line in capsys.readouterr().out.splitlines() if "all rewards of each prompt were equal" in line]
    assert len(told) == 1 and told[0] in log_of(tmp_path)
    assert told[0].startswith("in 2 steps in a row") and "reward.grpo.max_resamples" in told[0]


def after(*zero_spread: int, last: bool = False) -> list[str]:
    """What is told after each step of two prompts, of which so many are flat."""
    flat, told = FlatSteps(), []
    for number, groups in enumerate(zero_spread):
        flat.look(2, {"reward/zero_spread_groups": float(groups)})
        told += [f"{number + 1}: {line}" for line in flat.read(last=last and number == len(zero_spread) - 1)]
    return told


def test_flat_steps_are_counted_in_a_row():
    assert after(*[2] * (FLAT_STEPS - 1), 1, *[2] * (FLAT_STEPS - 1)) == []
    told = after(1, *[2] * (2 * FLAT_STEPS))
    assert len(told) == 1 and told[0].startswith(f"{FLAT_STEPS + 1}: in {FLAT_STEPS} steps in a row")
    assert after(2, 2, last=True)[0].startswith("2: in 2 steps in a row")
    assert after(2, last=True)[0].startswith("1: in the only step")
    assert after(1, 2, last=True) == []


def test_a_resumed_run_tells_it_no_second_time():
    first, second = FlatSteps(), FlatSteps()
    for _ in range(FLAT_STEPS):
        first.look(2, {"reward/zero_spread_groups": 2.0})
    assert first.read(last=False)
    second.load(first.state())
    second.look(2, {"reward/zero_spread_groups": 2.0})
    assert second.read(last=True) == []
