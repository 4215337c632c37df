"""What a run tells in tables: better and worse, what figures are on, and numbers that there are none of."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from glm_training.config import Config
from glm_training.engine.summary import (
    _captions,
    _heading,
    outline,
    resumed_line,
    scores_of,
    summary_row,
    told,
    write_summary,
)
from glm_training.engine.validation import Subject
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.console import Console
from glm_training.utils.distributed import World
from glm_training.utils.pictures import NO_CAPTION, Caption
from tests.config.building import build

NO_PICTURES = torch.empty(0, 3, 1, 1)
NAN = math.nan


def row(before: list[float], after: list[float], higher: bool | None = True) -> list[str]:
    return summary_row("score", torch.tensor(before), torch.tensor(after), higher)


PICTURES = {"data": {"images": "pics"}, "training": {"use_reward": False}}
TARGETS = {"training": {"use_reward": False}}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (PICTURES, "on 27 pictures: 9 steps of up to 8 pictures, on"),
        (TARGETS, "on 27 pictures: 9 steps of 8 pictures, on"),
        ({}, "on 27 prompts: 9 steps of 8 prompts x 4 images, on"),
        ({"training": {"reward_frequency": 2}}, "on 27 prompts: 9 steps of 8 prompts x 4 images, on"),
        ({"data": {"images": "pics"}, "training": {"use_reward": True}}, "on 27 prompts: 9 steps of up to 8 prompts x"),
        ({"model": {"family": "vgt"}, "data": {"images": "t"}}, "on 27 pictures: 9 steps of 8 pictures, on"),
    ],
)
def test_what_is_trained_on_has_its_name(sections: dict[str, Any], said: str) -> None:
    sizes = {"batch_size": 4, "gradient_accumulation_steps": 2}
    config = build(**sections | {"training": sections.get("training", {}) | sizes}, reward={"grpo": {"num_samples": 4}})
    assert said in outline(config, World(), 27, 9)


def test_a_resume_with_nothing_left_to_train_says_what_to_do() -> None:
    by_steps, by_epochs = (build(training={key: 2}) for key in ("max_steps", "num_epochs"))
    place = Path("runs/x/checkpoints/step-000004")
    assert resumed_line(by_steps, place, 4, 9) == f"resumed from {place}, step 4 of 9"
    assert resumed_line(by_steps, place, 4, 1) == (
        f"resumed from {place}: the run has 4 steps, past the 1 that it is to have (training.max_steps), and nothing "
        "is left to train. A larger training.max_steps trains on, and --resume with an earlier checkpoint goes back to "
        "it"
    )
    assert resumed_line(by_epochs, place, 4, 4) == (
        f"resumed from {place}: the run has all 4 of its steps, and nothing is left to train. A larger "
        "training.num_epochs trains on"
    )


def test_means_change_and_standard_error_by_hand():
    # changes 0.1 and 0.3: mean 0.2, standard deviation 0.1 * sqrt(2), over sqrt(2): 0.1
    assert row([0.2, 0.4], [0.3, 0.7])[:-1] == ["score", "0.300", "0.500", "+0.200", "0.100"]


def test_a_change_within_its_interval_is_called_neither():
    # by Student's t the interval of two reaches 12.7 standard errors to either side, that of five 2.78
    assert row([0.2, 0.4], [0.3, 0.7])[-1] == row([0.5], [0.25])[-1] == "cannot be told"
    ups = [0.1, 0.2, 0.3, 0.4, 0.5]  # mean 0.3, standard error 0.0707: 4.2 of them
    assert row([0.0] * 5, ups)[-1] == "better" and row(ups, [0.0] * 5)[-1] == "worse"
    assert row([0.2] * 5, ups)[-1] == "cannot be told"  # mean 0.1: 1.4 of them


@pytest.mark.parametrize(
    ("after", "higher", "verdict"),
    [
        (0.7, True, "better"),
        (0.3, True, "worse"),
        (0.7, False, "worse"),
        (0.3, False, "better"),
        (0.5, True, "same"),
        (0.7, None, ""),
    ],
)
def test_worse_is_called_worse(after, higher, verdict):
    assert row([0.5, 0.5], [after, after], higher)[-1] == verdict


def test_small_changes_are_seen():
    assert row([0.69315] * 2, [0.69360] * 2, False) == ["score", "0.69315", "0.69360", "+0.00045", "0.00000", "worse"]


def test_a_mean_that_stays_while_its_prompts_move_is_not_called_the_same():
    assert row([0.0, 1.0], [1.0, 0.0]) == ["score", "0.500", "0.500", "0.000", "1.000", "cannot be told"]


def test_one_sample_has_no_standard_error():
    assert row([0.5], [0.25]) == ["score", "0.500", "0.250", "-0.250", "-", "cannot be told"]


def test_what_has_no_figure_is_left_out_of_the_change():
    # the second has none after: the change is that of the first alone, the means are of all there is
    assert row([0.5, 0.9], [0.75, NAN]) == ["score", "0.700", "0.750", "+0.250", "-", "cannot be told"]
    assert row([NAN, NAN], [0.5, 0.5]) == ["score", "-", "0.500", "-", "-", ""]


def table(held_out_prompts: bool, weights: dict[str, float], before: Evaluation, after: Evaluation) -> str:
    config = Config.model_validate({"reward": {"metrics": weights}, "evaluation": {"samples_per_prompt": 1}})
    kind = "held-out" if held_out_prompts else "training"
    subjects = Subject(f"{kind} prompt", ("a", "b"), ""), Subject("held-out pair", ("a",), "")
    out = io.StringIO()
    write_summary(Console(output=out), config, None, subjects, before, after, 0)  # type: ignore[arg-type]
    return out.getvalue()


def columns(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in text.splitlines() if line.split()}


def test_scores_and_judgements_are_two_tables_named_for_what_they_are_on():
    before = Evaluation({"total": torch.tensor([0.5, 0.7])}, NO_PICTURES, {"ar/loss": torch.tensor([0.69])})
    after = Evaluation({"total": torch.tensor([0.4, 0.6])}, NO_PICTURES, {"ar/loss": torch.tensor([0.75])})
    text = table(False, {"structure": 1.0}, before, after)
    assert "Scores of 2 training prompts x 1 sample\n" in text and "Judged on 1 held-out pair\n" in text
    assert "held-out prompt" not in text
    assert columns(text)["reward"] == ["reward", "0.600", "0.500", "-0.100", "0.000", "worse"]
    assert columns(text)["ar"] == ["ar", "loss", "0.690", "0.750", "+0.060", "-", "cannot", "be", "told"]


def test_under_each_picture_stands_what_it_earned():
    """Of three pictures the second is exactly right; the third was not scored."""
    shown = {"total": torch.tensor([0.25, 1.0, NAN]), "exactly_right": torch.tensor([0.0, 1.0, NAN])}
    evaluation = Evaluation({}, torch.zeros(3, 3, 2, 2), shown=shown)
    assert _heading("after", evaluation, 3) == "after: 1 of 3 exactly right"
    assert _captions(evaluation, 3) == [Caption("reward 0.250"), Caption("exactly right", good=True), NO_CAPTION]
    assert _heading("after", evaluation, 1) == "after: 0 of 1 exactly right"
    without = Evaluation({}, torch.zeros(2, 3, 2, 2))
    assert _heading("before", without, 2) == "before" and _captions(without, 2) == [NO_CAPTION] * 2


def test_a_metric_that_counts_against_the_total_gets_better_when_it_falls():
    before, after = (
        Evaluation({"total": torch.ones(2), "noise": torch.tensor([value] * 2)}, NO_PICTURES) for value in (0.5, 0.25)
    )
    weights = {"structure": 1.0, "tests.weighted:noise": -1.0}
    assert columns(table(True, weights, before, after))["noise"][-1] == "worse"  # another metric of that name
    assert columns(table(True, {"structure": 1.0, "noise": -1.0}, before, after))["noise"][-1] == "better"


def test_lines_of_an_evaluation_say_what_they_are_on():
    subjects = (
        Subject("training prompt", ("a cat",), "0123456789abcdef01"),
        Subject("held-out pair", ("a dog", "a cow"), ""),
    )
    judged = {"ar/loss": torch.tensor([0.5, 0.7]), "ar/margin": torch.tensor([NAN, -0.25])}
    evaluation = Evaluation({"total": torch.tensor([-0.0004])}, NO_PICTURES, judged)
    assert told(subjects, evaluation) == ["1 training prompt: reward 0.000", "2 held-out pairs: ar loss 0.600"]
    lines = json.loads(json.dumps(scores_of(subjects, 5, evaluation)))
    assert lines == [
        {
            "step": 5,
            "on": "training prompts",
            "digest": "0123456789abcdef",
            "prompts": ["a cat"],
            "scores": {"total": [-0.0004]},
        },
        {
            "step": 5,
            "on": "held-out pairs",
            "digest": "",
            "prompts": ["a dog", "a cow"],
            "scores": {"ar/loss": [0.5, 0.7], "ar/margin": [None, -0.25]},
        },
    ]
