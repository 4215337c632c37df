"""Under the verdict stands what speaks against it: monitors, figures that fell, prompts learned by heart."""

from __future__ import annotations

from glm_training.report.comparison import compare
from glm_training.report.doubts import doubts
from glm_training.report.monitors import Watched
from glm_training.report.run import read_run, read_runs
from glm_training.report.terminal import below
from tests.report_runs import write_run

UP = {"total": [0.1, 0.2, 0.3], "objects": [0.5, 0.6, 0.7]}


def monitor(name: str, used: float, *tripped: str) -> Watched:
    return Watched(name, f"monitor/{name}", "", 0.5, 0.5, used, 0.0, 1.0, list(tripped))


def test_a_run_says_what_speaks_against_its_gain(tmp_path):
    later = {"total": [0.5, 0.61, 0.7], "objects": [0.1, 0.21, 0.3]}
    figures = [{"step": 3, "gap_change/total": 0.25}]
    run = read_run(write_run(tmp_path / "a", {0: UP, 3: later}, figures=figures))
    fell = ["Worse than at the start: objects", "Training prompts have gained 0.250 more than held-out ones"]
    assert doubts(run, []) == fell
    over = [monitor("edges", 1.2), monitor("saturation", 3.0), monitor("diversity", 0.1)]
    hacked = "The reward may be hacked: edges and saturation are over their limits (2 of 3 monitors)"
    assert doubts(run, over) == [hacked, *fell]
    assert doubts(run, [monitor("edges", 0.4, "monitor edges: ..."), monitor("diversity", 0.1)])[0] == (
        "Monitors: all 2 are within their limits now, edges is nearest (40% of its own); over it before: edges"
    )
    assert doubts(run, [monitor("edges", 0.4)])[0] == "Monitors: edges is within its limit now, at 40% of it"


def test_of_several_runs_those_over_their_limits_are_named(tmp_path):
    runs = read_runs([write_run(tmp_path / name, {1: UP}) for name in "ab"])
    lines = below(runs, [[], [monitor("edges", 1.2)]], compare(runs))
    assert lines[-1] == "b: The reward may be hacked: edges is over its limit (1 of 1 monitors)"


def test_rewards_that_differ_are_told_as_a_person_says_them(tmp_path):
    own = write_run(tmp_path / "a", {1: UP}, reward__metrics={"lpips": 0.5, "objects": 1.0})
    other = write_run(tmp_path / "b", {1: UP}, reward__calculator="mine.py:Red", reward__weights={"lpips": 0.4})
    assert compare(read_runs([own, other])).headline.endswith("(lpips 0.5, objects 1.0 against mine.py:Red)")
