"""How metrics of the user's are called: by the name of their own, or as their class; clashes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glm_training.engine.held_out_metrics import held_out_metrics
from glm_training.engine.summary import only_metric, told
from glm_training.engine.validation import Subject
from glm_training.evaluation.held_out import Evaluation
from glm_training.rewards import RewardBatch, RewardCalculator, RewardConfigError, build_calculator
from glm_training.rewards.reward_calculator import METRICS, TAKEN
from glm_training.utils.distributed import World
from tests.runs import config_of, trainer_of

HEAD = "from glm_training.rewards import RewardCalculator\n\n\n"


def write(folder: Path, file: str, class_name: str, name: str = "", value: float = 0.5) -> str:
    """A class of the user's in a file of its own."""
    (folder / file).write_text(
        f"{HEAD}class {class_name}(RewardCalculator):\n{f'    name = {name}' if name else ''}\n"
        f"    def compute_reward(self, generated_image, target_image, prompt):\n        return {value}\n",
        encoding="utf-8",
    )
    return f"{folder}/{file}:{class_name}"


@pytest.mark.parametrize(("name", "called"), [("", "Own"), ("'faces'", "faces"), ("None", "Own"), ("3", "Own")])
def test_a_metric_is_called_by_its_name_or_as_its_class(tmp_path: Path, name: str, called: str) -> None:
    spec = write(tmp_path, "own.py", "Own", name)
    calculator = RewardCalculator({spec: 3.0, "structure": 1.0})
    assert calculator.names == {spec: called, "structure": "structure"}
    assert calculator.weights == {called: 3.0, "structure": 1.0}
    batch = RewardBatch(torch.zeros(1, 3, 8, 8), ["a"], targets=torch.zeros(1, 3, 8, 8))
    result = calculator.compute_rewards(batch)
    assert list(result.components) == [called, "structure"] and result.total.item() == (3 * 0.5 + 1) / 4
    assert result.total_for({spec: 1.0, "structure": 3.0}).item() == (0.5 + 3) / 4, "as the configuration writes them"
    assert calculator.check_prompts(["a"], True, False, {spec: 1.0}).applies[called] == 1


@pytest.mark.parametrize("name", ["''", "'a/b'", "'two words'", "'lpips'", "'total'", "'group_std'", "'custom'"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, name: str) -> None:
    spec = write(tmp_path, "own.py", "Own", name)
    if name == "''":
        assert RewardCalculator({spec: 1}).names == {spec: "Own"}
        return
    with pytest.raises(RewardConfigError, match=f"own.py:Own' is called {name}.*give Own another `name`"):
        RewardCalculator({spec: 1})


def test_two_metrics_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path, "a.py", "Own"), write(tmp_path, "b.py", "Own")
    with pytest.raises(RewardConfigError, match="two metrics are called 'Own': .*a.py:Own and .*b.py:Own.*`name`"):
        build_calculator(None, {first: 1.0, second: 1.0})
    other = write(tmp_path, "c.py", "Other", "'Own'")
    with pytest.raises(RewardConfigError, match="two metrics are called 'Own'"):
        RewardCalculator({first: 1, other: 1})


def test_a_watched_metric_is_not_called_as_a_trained_one(tmp_path: Path) -> None:
    first, second = write(tmp_path, "a.py", "Own"), write(tmp_path, "b.py", "Own")
    overrides = [f"reward.metrics={{'{first}': 1.0}}", f"reward.monitors.metrics=['{second}']"]
    config = config_of(tmp_path, *overrides, "evaluation.enabled=true")
    with pytest.raises(RewardConfigError, match="monitors.metrics: .*b.py:Own is called 'Own', as another"):
        trainer_of(tmp_path, *overrides, "evaluation.enabled=true")
    watched = held_out_metrics(config, World(), trainer_of(tmp_path).held_out)
    assert watched is not None and list(watched.calculators) == ["Own"]


def test_a_run_logs_the_names_for_both_halves_and_prints_one_metric_once(tmp_path: Path, capsys) -> None:
    """Two metrics, one for each half, and a third that is watched; then one metric alone."""
    plan, render = write(tmp_path, "a.py", "Plan", "'plan'"), write(tmp_path, "b.py", "Render", value=0.25)
    watched = write(tmp_path, "c.py", "Seen", value=0.75)
    shared = ["training.max_steps=1", "training.batch_size=1", "reward.grpo.gate=false", "evaluation.enabled=true"]
    shared += ["evaluation.num_eval_samples=1", "reward.monitors.window=1"]
    halves = [f"reward.ar.weights={{'{plan}': 1.0}}", f"reward.dit.weights={{'{render}': 1.0}}"]
    metrics = [f"reward.metrics={{'{plan}': 1.0, '{render}': 1.0}}", f"reward.monitors.metrics=['{watched}']"]
    trainer = trainer_of(tmp_path, *shared, *metrics, *halves)
    result = trainer.train()
    assert result.after == {"total": 0.375, "plan": 0.5, "Render": 0.25, "Seen": 0.75}
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    for name in ("reward/plan", "reward/Render", "reward/ar_total", "eval/Seen", "eval/total"):
        assert f'"{name}"' in text, name
    assert str(tmp_path) not in text
    assert trainer.monitors.held_out == ("Seen",)
    told_of_three = capsys.readouterr().out
    assert "reward 0.375  plan 0.500  Render 0.250  Seen 0.750" in told_of_three
    alone = [f"reward.metrics={{'{plan}': 1.0}}", f"output_dir={tmp_path}/alone"]
    trainer_of(tmp_path, *shared, *alone).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "plan" in line and "plans" not in line]
    assert sum("reward (plan)" in line for line in lines) == len(lines) >= 2, lines


def evaluation(**scores: list[float]) -> Evaluation:
    return Evaluation({name: torch.tensor(values) for name, values in scores.items()}, torch.empty(0, 3, 1, 1))


def test_the_only_metric_is_the_one_that_is_the_total() -> None:
    nan = float("nan")
    assert only_metric(evaluation(total=[1.0, nan], a=[1.0, nan])) == "a"
    assert only_metric(evaluation(total=[1.0, 2.0], a=[1.0, 2.0], watched=[0.0, 2.0])) == "a"
    assert only_metric(evaluation(total=[0.0, 0.0], a=[0.0, 0.0], b=[0.0, 0.0])) is None
    assert only_metric(evaluation(total=[1.0], a=[0.5])) is None and only_metric(evaluation(a=[1.0])) is None
    assert only_metric(evaluation(total=[1.0], a=[1.0]), evaluation(total=[1.0], a=[0.5])) is None


def test_a_remote_metric_is_printed_too() -> None:
    scores = {"total": torch.tensor([0.5]), "remote/judge": torch.tensor([0.25]), "structure": torch.tensor([0.75])}
    subject = Subject("held-out prompt", ("a",), "0" * 12)
    (line,) = told((subject, None), Evaluation(scores, torch.empty(0, 3, 1, 1)))
    assert line.endswith("reward 0.500  remote judge 0.250  structure 0.750")


def test_every_figure_beside_the_metrics_is_a_taken_name(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "reward.grpo.max_resamples=1", "training.batch_size=1")
    figures = {name.removeprefix("reward/") for name in trainer.training_step() if name.startswith("reward/")}
    assert figures - {"structure"} <= TAKEN and set(METRICS) <= TAKEN


def test_weights_of_one_half_need_apply_to_some_samples_only() -> None:
    calculator = RewardCalculator({"text_accuracy": 1, "structure": 1})
    words = calculator.check_prompts(['a "SIGN"', "plain"], True, False, weights={"text_accuracy": 1})
    assert words.problems == []
    assert "applies to 1 of 2 samples (it needs" in words.notes[0]
    assert words.notes[0].endswith("the half that it alone is paid for learns from those")
    both = calculator.check_prompts(['a "SIGN"', "plain"], True, False)
    assert both.notes[0].endswith("the other weights are renormalised on the rest")
    (problem,) = calculator.check_prompts(["a", "b"], True, False, weights={"text_accuracy": 1}).problems
    assert problem.startswith("no metric of ['text_accuracy'] applies to 2 samples")
