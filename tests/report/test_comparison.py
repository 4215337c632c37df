"""Which run is better: the verdict, the interval by hand, and when it cannot be told."""

from __future__ import annotations

import pytest

from glm_training.report.comparison import changes, compare, compared_rows
from glm_training.report.run import read_runs
from tests.report_runs import write_run

A = [0.1, 0.5, 0.9, 0.3]
METRICS = {"objects": 1.0}


def two(tmp_path, first, second, **both):
    one = write_run(tmp_path / "a", {10: {"total": first}}, reward__metrics=METRICS, **both)
    other = write_run(tmp_path / "b", {10: {"total": second}}, reward__metrics=METRICS, **both)
    return read_runs([one, other])


def test_the_better_run_by_the_paired_difference(tmp_path):
    # differences 0.1, 0.2, 0.3, 0.2: mean 0.2, s = sqrt(0.02/3) = 0.0816497, se = 0.0408248, t(3) = 3.1824463
    runs = two(tmp_path, A, [0.2, 0.7, 1.2, 0.5])
    row = compared_rows(*runs)[0]
    assert row.difference.mean == pytest.approx(0.2)
    assert row.difference.low == pytest.approx(0.2 - 3.1824463 * 0.0408248, abs=1e-6)
    assert row.better == 1
    assert compare(runs).headline == (
        "b is better than a: reward 0.650 against 0.450, +0.200 (95 % interval +0.070 to +0.330), paired over 4 prompts"
    )
    flipped = compare(runs[::-1]).headline
    assert flipped.startswith("b is better than a: reward 0.650 against 0.450, +0.200 (95 % interval +0.070")


def test_a_small_difference_is_seen_in_the_figures_themselves(tmp_path):
    headline = compare(two(tmp_path, A, [score + 2e-5 for score in A])).headline
    assert headline.startswith("b is better than a: reward 0.450020 against 0.450000, +0.000020 (95 %")


def test_what_cannot_be_told_is_said(tmp_path):
    found = compare(two(tmp_path, A, [0.2, 0.4, 1.0, 0.2]))
    assert found.headline.startswith("It cannot be told whether a or b is better: reward 0.450 against 0.450")


def test_the_same_scores(tmp_path):
    assert compare(two(tmp_path, A, A)).headline == "a and b are the same on 4 prompts: reward 0.450"


def test_prompts_are_matched_by_text_and_the_others_left_out(tmp_path):
    one = write_run(tmp_path / "a", {1: {"total": [0.0, 1.0, 5.0]}}, prompts=["x", "y", "only a"])
    other = write_run(tmp_path / "b", {1: {"total": [1.5, 0.5, 9.0]}}, prompts=["y", "x", "only b"])
    runs = read_runs([one, other])
    row = compared_rows(*runs)[0]
    assert (row.means, row.difference.count, row.left_out) == ((0.5, 1.0), 2, 2)
    assert any(line.startswith("Left out: 2 prompts") for line in compare(runs).details)


@pytest.mark.parametrize(
    ("digests", "pairs", "alike"), [(("7", "7"), 3, True), (("7", "8"), 1, False), (("", ""), 1, False)]
)
def test_prompts_without_a_text_of_their_own_are_matched_in_the_same_set_alone(tmp_path, digests, pairs, alike):
    folders = [
        write_run(
            tmp_path / name, {1: {"autoencoder/psnr": [shift, shift + 1.0, shift]}}, prompts=["", "", "x"], digest=own
        )
        for name, shift, own in zip("ab", (0.0, 0.25), digests, strict=True)
    ]
    runs = read_runs(folders)
    (row,) = compared_rows(*runs)
    assert (row.difference.count, row.alike) == (pairs, alike)
    assert any("matched by their text alone" in line for line in compare(runs).details) is not alike


def test_other_prompts_give_no_verdict(tmp_path):
    one = write_run(tmp_path / "a", {1: {"total": [0.0, 0.1]}}, prompts=["x", "y"])
    other = write_run(tmp_path / "b", {1: {"total": [0.9, 1.0]}}, prompts=["v", "w"])
    headline = compare(read_runs([one, other])).headline
    assert "cannot be told" in headline and "on other prompts" in headline and "in the prompts alone" in headline


def test_missing_scores_are_left_out_in_pairs(tmp_path):
    runs = two(tmp_path, [0.1, None, 0.5], [0.2, 0.9, None])
    row = compared_rows(*runs)[0]
    assert (row.difference.count, row.difference.low) == (1, None)
    assert "one prompt has no interval" in compare(runs).headline


def test_rewards_of_other_metrics_are_not_compared(tmp_path):
    one = write_run(tmp_path / "a", {1: {"total": A}}, reward__metrics={"objects": 1.0})
    other = write_run(tmp_path / "b", {1: {"total": A}}, reward__metrics={"clip_score": 1.0})
    headline = compare(read_runs([one, other])).headline
    assert headline.startswith("It cannot be told which is better: their rewards are not of the same metrics")


def test_options_count_of_the_metrics_that_are_used_and_known_to_both(tmp_path):
    def with_options(name: str, **options):
        return write_run(tmp_path / name, {1: {"total": A}}, reward__metrics=METRICS, reward__options=options)

    first = with_options("a", objects={"color": 1.0}, ocr={"engine": "x"})
    newer = with_options("b", objects={"color": 1.0, "added": 2}, ocr={"engine": "y"})
    other = with_options("c", objects={"color": 0.5})
    assert "are the same" in compare(read_runs([first, newer])).headline
    assert "reward.options.objects.color: 1.0 against 0.5" in compare(read_runs([first, other])).headline


@pytest.mark.parametrize(
    ("figure", "winner"), [("dit/loss", "a"), ("unet/accuracy", "b"), ("autoencoder/psnr", "b"), ("score_hps", "b")]
)
def test_runs_without_a_reward_are_judged_by_what_they_have(tmp_path, figure, winner):
    one = write_run(tmp_path / "a", {1: {figure: [0.1, 0.2, 0.3]}}, on="held-out targets")
    other = write_run(tmp_path / "b", {1: {figure: [0.2, 0.31, 0.4]}}, on="held-out targets")
    assert compare(read_runs([one, other])).headline.startswith(f"{winner} is better")


def test_halves_that_disagree(tmp_path):
    one = write_run(tmp_path / "a", {1: {"ar/loss": [0.1, 0.2, 0.3], "dit/loss": [0.1, 0.2, 0.3]}})
    other = write_run(tmp_path / "b", {1: {"ar/loss": [0.2, 0.31, 0.4], "dit/loss": [0.0, 0.09, 0.2]}})
    assert compare(read_runs([one, other])).headline.startswith("Neither is better: b in dit loss, a in ar loss")


def test_runs_that_end_at_different_steps_are_also_compared_where_both_have_been(tmp_path):
    one = write_run(tmp_path / "a", {5: {"total": [0.0, 0.1]}, 10: {"total": [0.9, 1.0]}})
    other = write_run(tmp_path / "b", {5: {"total": [0.5, 0.61]}})
    found = compare(read_runs([one, other]))
    assert found.headline.startswith("It cannot be told") or found.headline.startswith("a is better")
    assert any(line.startswith("At step 5: b is better than a") for line in found.details)
    assert any("different numbers of steps" in line for line in found.details)


def test_other_settings_of_the_evaluation_are_named(tmp_path):
    one = write_run(tmp_path / "a", {1: {"total": A}}, evaluation__samples_per_prompt=1)
    other = write_run(tmp_path / "b", {1: {"total": A}}, evaluation__samples_per_prompt=4)
    found = compare(read_runs([one, other]))
    assert any("evaluation.samples_per_prompt: 1 against 4" in line for line in found.details)
    assert found.settings["evaluation.samples_per_prompt"] == [1, 4]


def test_several_runs_have_wider_intervals(tmp_path):
    folders = [
        write_run(
            tmp_path / name,
            {1: {"total": [score + shift * k for k, score in zip((0.9, 1.0, 1.1, 1.0), A, strict=True)]}},
        )
        for name, shift in (("a", 0.0), ("b", 0.1), ("c", 0.3))
    ]
    found = compare(read_runs(folders))
    assert found.headline == "c is the best of 3: reward 0.750"
    assert "98.3 % interval" in found.details[0]


def test_a_run_without_evaluations(tmp_path):
    found = compare(read_runs([write_run(tmp_path / "a", {1: {"total": A}}), write_run(tmp_path / "b")]))
    assert found.headline == "It cannot be told which is better: b has no evaluation"


def test_changes_of_one_run_are_from_its_first_to_its_last_evaluation(tmp_path):
    (run,) = read_runs(
        [write_run(tmp_path / "a", {0: {"total": A}, 5: {"total": [0, 0, 0, 0]}, 9: {"total": [1.0] * 4}})]
    )
    (row,) = changes(run)
    assert (row.steps, row.means) == ((0, 9), (0.45, 1.0))
