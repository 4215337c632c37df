"""The gap between training and held-out reward: which steps, which means, and that it goes on from a checkpoint."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from glm_training.engine.figures import Mean
from glm_training.engine.gap import TrainingRewards
from glm_training.engine.validation import Subject
from glm_training.evaluation.held_out import Evaluation
from glm_training.utils.console import Console
from glm_training.utils.words import number
from tests.runs import trainer_of

NAN = float("nan")


def evaluation(*totals: float, **scores: list[float]) -> Evaluation:
    named = {"total": list(totals), **scores}
    return Evaluation({name: torch.tensor(values) for name, values in named.items()}, torch.zeros(0, 3, 1, 1))


def rewards(window: int, *totals: float) -> TrainingRewards:
    """Of steps with these totals."""
    taken = TrainingRewards(window)
    for total in totals:
        taken.add([], {"reward/total": Mean(total, 8)})
    return taken


def test_the_gap_is_that_of_the_latest_steps_and_its_change_that_of_two_changes():
    """First steps .25 and .35, latest .6 and .8: mean .7, a rise of .4; evaluation .5 -> .625, a rise of .125."""
    taken = rewards(2, 0.25, 0.35, 0.9, 0.6, 0.8)
    before, now = evaluation(0.25, 0.75), evaluation(0.5, 0.75)
    figures = taken.gaps(before, now)
    assert figures == {"gap/total": pytest.approx(0.7 - 0.625), "gap_change/total": pytest.approx(0.4 - 0.125)}
    # two values that differ by d have a mean with standard error d / 2
    expected = math.sqrt(0.05**2 + 0.1**2 + 0.125**2)
    assert taken.change("total", before, now)[1] == pytest.approx(expected, rel=1e-6)


def test_a_step_counts_by_its_scored_samples_and_only_where_it_has_the_figure():
    taken = TrainingRewards(3)
    taken.add(["own", "absent"], {"reward/total": Mean(0.5, 6), "reward/own": Mean(1.0, 6), "reward/group_std": 0.1})
    taken.add(["own", "absent"], {"reward/total": Mean(0.1, 2)})
    figures = taken.gaps(evaluation(0.0), evaluation(0.25, own=[0.75], watched=[0.5], group_std=[0.5]))
    assert figures == {"gap/total": pytest.approx((0.5 * 6 + 0.1 * 2) / 8 - 0.25), "gap/own": pytest.approx(0.25)}


@pytest.mark.parametrize(("steps", "known"), [(3, False), (4, True)])
def test_the_change_waits_until_first_and_latest_steps_are_apart(steps, known):
    taken = rewards(2, *[0.5] * steps)
    assert ("gap_change/total" in taken.gaps(evaluation(0.5), evaluation(0.5))) == known


def test_without_a_training_step_there_is_no_gap():
    assert rewards(2).gaps(evaluation(0.5), evaluation(0.5)) == {}
    supervised = TrainingRewards(2)
    supervised.add([], {"ar/loss": 1.0})
    assert supervised.state()["steps"] == 0


def test_prompts_without_a_score_in_one_evaluation_are_left_out_of_the_change():
    taken = rewards(1, 0.5, 0.5)
    figures = taken.gaps(evaluation(0.25, 0.1), evaluation(0.5, NAN))
    assert figures == {"gap/total": pytest.approx(0.0), "gap_change/total": pytest.approx(-0.25)}
    assert taken.change("total", evaluation(0.25, 0.1), evaluation(0.5, NAN))[1] is None
    assert "gap_change/total" not in taken.gaps(evaluation(NAN), evaluation(0.5))


def test_where_groups_were_drawn_anew_the_total_before_that_counts_alone():
    taken = TrainingRewards(1)
    kept = {"reward/total": Mean(0.5, 8), "reward/own": Mean(0.5, 8)}
    taken.add(["own"], {**kept, "reward/total_before_resampling": Mean(0.75, 8)})
    figures = taken.gaps(evaluation(0.5, own=[0.5]), evaluation(0.5, own=[0.5]))
    assert figures == {"gap/total": pytest.approx(0.25)}


@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_a_resume_goes_on_to_the_last_bit_whatever_the_windows(at):
    totals = (0.1, 0.7, 0.2, 0.3, 0.9, 0.4, 0.6)
    again = TrainingRewards(2)
    again.load(json.loads(json.dumps(rewards(2, *totals[:at]).state())))
    for total in totals[at:]:
        again.add([], {"reward/total": Mean(total, 8)})
    before, now = evaluation(0.1, 0.3), evaluation(0.2, 0.5)
    assert again.gaps(before, now) == rewards(2, *totals).gaps(before, now)


def test_another_window_after_a_resume_takes_no_late_step_for_a_first_one():
    wider = TrainingRewards(4)
    wider.load(rewards(2, 0.1, 0.2, 0.3, 0.4, 0.5).state())
    wider.add([], {"reward/total": Mean(0.9, 8)})
    assert [row["total"][0] for row in wider.state()["first"]] == [0.1, 0.2]
    soon = TrainingRewards(4)
    soon.load(rewards(1, 0.1, 0.2).state())
    soon.add([], {"reward/total": Mean(0.9, 8)})
    assert [row["total"][0] for row in soon.state()["first"]] == [0.1]
    narrower = TrainingRewards(1)
    narrower.load(rewards(2, 0.1, 0.2, 0.3).state())
    assert [row["total"][0] for row in narrower.state()["first"]] == [0.1]
    assert narrower.gaps(evaluation(0.0), evaluation(0.0))["gap/total"] == pytest.approx(0.3)


def test_the_table_has_the_gap_its_change_and_what_is_exactly_right_first():
    taken = TrainingRewards(1)
    for total, right in ((0.5, 0.25), (0.75, 0.5)):
        taken.add(["own", "exactly_right"], {"reward/total": total, "reward/own": total, "reward/exactly_right": right})
    before = evaluation(0.5, 0.5, own=[0.5, 0.5], exactly_right=[0.0, 0.0])
    now = evaluation(0.5, 0.75, own=[0.5, 0.75], exactly_right=[0.0, 0.5])
    out = io.StringIO()
    taken.write_table(Console(output=out), Subject("held-out prompt", ("a", "b"), ""), before, now)
    title, headings, _, *rows = out.getvalue().splitlines()
    assert title == "Training prompts of the last 1 step beside 2 held-out prompts"
    assert headings.split() == ["score", "training", "evaluated", "gap", "change", "standard", "error"]
    assert [row.split() for row in rows] == [
        ["exactly", "right", "0.500", "0.250", "+0.250", "0.000", "-"],
        ["reward", "(own)", "0.750", "0.625", "+0.125", "+0.125", "-"],
    ]
    assert max(map(len, out.getvalue().splitlines())) <= 80


RUN = [
    "model.component=dit",
    "training.batch_size=1",
    "reward.grpo.num_samples=2",
    "reward.monitors.window=1",
    "evaluation.enabled=true",
    "evaluation.num_eval_samples=2",
    "logging.eval_interval=2",
    "logging.save_interval=1",
]


def logged(folder) -> dict[int, dict[str, float]]:
    """All figures of each step."""
    steps: dict[int, dict[str, float]] = {}
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        steps.setdefault(figures["step"], {}).update(figures)
    return steps


def test_every_evaluation_of_a_run_has_its_gap_and_so_has_the_table_and_a_resume(tmp_path, capsys):
    trainer_of(tmp_path, *RUN, "training.max_steps=4").train()
    steps = logged(tmp_path)
    for step in (2, 4):
        for name in ("total", "structure"):
            training, first = steps[step][f"reward/{name}"], steps[1][f"reward/{name}"]
            gap, score, start = (
                steps[at][f"{kind}/{name}"] for at, kind in ((step, "gap"), (step, "eval"), (0, "eval"))
            )
            assert gap == pytest.approx(training - score, abs=1e-6)
            assert steps[step][f"gap_change/{name}"] == pytest.approx(training - first - (score - start), abs=1e-6)
    assert not any(name.startswith("gap") for at in (0, 1, 3) for name in steps[at])
    table = capsys.readouterr().out.partition("Training prompts of the last 1 step beside 2 training prompts\n")[2]
    score, gap = (number(steps[4][f"{kind}/total"], spec) for kind, spec in (("eval", ".3f"), ("gap", "+.3f")))
    (row,) = [line.split() for line in table.splitlines() if line.startswith("reward")]
    assert row[-5:-2] == [number(steps[4]["reward/total"]), score, gap]
    resume = f"checkpoint.resume_from={tmp_path}/run/checkpoints/step-000001"
    trainer_of(tmp_path, *RUN, "training.max_steps=4", resume).train()
    gaps = {name: value for name, value in logged(tmp_path)[4].items() if name.startswith("gap")}
    assert gaps == {name: value for name, value in steps[4].items() if name.startswith("gap")} and len(gaps) == 4
