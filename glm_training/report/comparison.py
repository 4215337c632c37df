"""Which of several runs is better, by how much, and how sure that is: by their held-out scores, prompt by prompt.

What both were scored on is paired, so that easy and hard prompts drop out of the difference; what is left over says
nothing of the other run and is left out. Several runs are compared in all pairs, each interval widened so that all of
them hold at once (Bonferroni), since the best one is picked after looking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from glm_training.report.run import Evaluated, Run, flattened
from glm_training.utils.figure_names import RIGHT, direction, label
from glm_training.utils.statistics import CONFIDENCE, Estimate, estimate, welch
from glm_training.utils.words import counted, number

PARTS = ("ar", "dit", "unet", "autoencoder", "generator")
"""First part of the names of judged figures; all others are scores, of which more is better."""
JUDGED_BY = ("accuracy", "psnr", "loss")
"""Which judged figure of a part decides, the first that is there."""
SCORED_BY = ("reward.metrics", "reward.calculator", "reward.weights")
"""Settings on which the meaning of a reward depends, beside the options of its metrics."""
MAX_TOLD = 4
"""Settings that a line names; all of them are on the page."""
DRAWN_BY = ("evaluation.samples_per_prompt", "evaluation.seed", "evaluation.num_inference_steps",
            "evaluation.guidance_scale", "model.ar", "model.dit", "model.unet", "model.generator",
            "data.image_size")  # fmt: skip
"""Settings on which the pictures of an evaluation depend besides the weights."""


@dataclass(frozen=True)
class Row:
    """One figure of two runs. `means`: over what is compared. `difference`: second minus first; `paired`: whether of
    the same prompts, and `alike` of the very same set of them. `better`: 1 where the second is, -1 where the first is,
    0 where that cannot be told, None where neither direction is better. `left_out`: prompts of either that the other
    has no score for."""

    figure: str
    steps: tuple[int, int]
    means: tuple[float, float]
    difference: Estimate
    paired: bool
    alike: bool
    better: int | None
    left_out: int

    @property
    def same(self) -> bool:
        """Whether the two are alike on every prompt, as far as one can see."""
        return self.paired and self.difference.mean == 0 and self.difference.low in (0, None)


@dataclass(frozen=True)
class Comparison:
    """`headline`: the verdict in one sentence; `details`: what it rests on, a line each. `rows`: of two runs, all
    figures that both have. `settings`: key -> its value in each run, where they differ."""

    names: list[str]
    headline: str
    details: list[str]
    rows: list[Row]
    settings: dict[str, list[Any]]


def better_when_higher(figure: str) -> bool | None:
    """Which way a figure of an evaluation should go; None where neither is better."""
    return direction(figure) if figure.split("/")[0] in PARTS else True


def compare(runs: Sequence[Run]) -> Comparison:
    """Of two runs or more, by where each ended."""
    names = [run.name for run in runs]
    settings = differing([flattened(run.config) for run in runs])
    pairs = list(combinations(range(len(runs)), 2))
    confidence = 1 - (1 - CONFIDENCE) / len(pairs)
    first, second = runs[0], runs[1]
    rows = compared_rows(first, second) if len(runs) == 2 else []
    deciding = _deciding(runs)
    if isinstance(deciding, str):
        return Comparison(names, deciding, [*_standings(runs), *_warnings(runs, [], settings)], rows, settings)
    found = {
        (one, two, figure): _last_of_both(runs[one], runs[two], figure, confidence)
        for one, two in pairs
        for figure in deciding
    }
    if len(runs) == 2:
        used = [row for figure in deciding if (row := found[0, 1, figure]) is not None]
        lines = [_sentence(runs, 0, 1, row, confidence) for row in used]
        headline, rest = _of_two(names, used, lines), lines[1:] + _at_common_step(first, second, used)
    else:
        headline, rest, used = _of_many(runs, deciding[0], found, confidence)
    return Comparison(names, headline, [*rest, *_standings(runs), *_warnings(runs, used, settings)], rows, settings)


def compared_rows(first: Run, second: Run) -> list[Row]:
    """Every figure that the last evaluations of both have."""
    rows = [_last_of_both(first, second, figure) for figure in _figures(first)]
    return [row for row in rows if row is not None]


def changes(run: Run) -> list[Row]:
    """Every figure of a run's evaluations, from its first one to its last."""
    rows = []
    for figure in _figures(run):
        found = [one for one in run.evaluations if figure in one.scores]
        one, two = found[0], found[-1]
        if one.prompts == two.prompts:  # a run whose evaluation sets change begins its evaluations anew
            one, two = replace(one, digest="own"), replace(two, digest="own")
        row = row_of(one, two, figure) if found[0].step < found[-1].step else None
        if row is not None:
            rows.append(row)
    return rows


def _figures(run: Run) -> list[str]:
    return sorted(dict.fromkeys(name for one in run.evaluations for name in one.scores), key=_order)


def _order(figure: str) -> tuple[int, int]:
    first = {"total": 0, RIGHT: 1, **{kind: 2 + place for place, kind in enumerate(JUDGED_BY)}}
    return (first.get(figure.split("/")[-1] if figure.split("/")[0] in PARTS else figure, 9), figure.count("/"))


def _deciding(runs: Sequence[Run]) -> list[str] | str:
    """The figures by which runs are compared, or why they cannot be."""
    without = [run.name for run in runs if not run.evaluations]
    if without:
        few = "has" if len(without) == 1 else "have"
        return f"It cannot be told which is better: {' and '.join(without)} {few} no evaluation"
    common = [set.union(*(set(one.scores) for one in run.evaluations)) for run in runs]
    shared = set.intersection(*common)
    if "total" in shared:
        rewards = differing([_of_reward(run) for run in runs])
        rewards = {key: found for key, found in rewards.items() if key in SCORED_BY or _contradict(found)}
        if not rewards:
            return ["total"]
        names = [_rewarded(run) for run in runs]
        what = _listed(rewards) if len(set(names)) == 1 else " against ".join(names)
        return f"It cannot be told which is better: their rewards are not of the same metrics ({what})"
    judged = [
        next((name for kind in JUDGED_BY if (name := f"{part}/{kind}") in shared), None)
        for part in dict.fromkeys(name.split("/")[0] for name in sorted(shared))
        if part in PARTS
    ]
    scores = sorted((name for name in shared if name.split("/")[0] not in PARTS and "/" not in name), key=_order)
    found = [name for name in judged if name is not None] or scores
    return found or "It cannot be told which is better: they have no figure of an evaluation in common"


def _of_reward(run: Run) -> dict[str, Any]:
    """What the meaning of its reward depends on. An older run may lack an option, which then is what it is now."""
    found = {key: run.setting(key) for key in SCORED_BY}
    metrics = found["reward.metrics"] if isinstance(found["reward.metrics"], dict) else {}
    options = {name: run.setting(f"reward.options.{name}") for name in metrics}
    return found | flattened({"reward.options": {k: v for k, v in options.items() if v is not None}})


def _rewarded(run: Run) -> str:
    """What a run was paid for, as a person says it: `objects 1.0, text_accuracy 0.5`, or its own calculator."""
    own, metrics = run.setting("reward.calculator"), run.setting("reward.metrics")
    weights = metrics if isinstance(metrics, dict) else run.setting("reward.weights")
    if own is not None or not isinstance(weights, dict):
        return shown(own)
    return ", ".join(f"{name} {shown(weight)}" for name, weight in weights.items())


def _contradict(values: list[Any]) -> bool:
    """Whether the runs that have a value have different ones."""
    return len({repr(value) for value in values if value is not None}) > 1


def _listed(settings: dict[str, list[Any]]) -> str:
    lines = [f"{key}: {' against '.join(map(shown, values))}" for key, values in list(settings.items())[:MAX_TOLD]]
    more = len(settings) - len(lines)
    return "; ".join(lines) + (f"; and {more} more" if more else "")


def _last_of_both(first: Run, second: Run, figure: str, confidence: float = CONFIDENCE) -> Row | None:
    one, two = first.evaluated(figure), second.evaluated(figure)
    return None if one is None or two is None else row_of(one, two, figure, confidence)


def row_of(one: Evaluated, two: Evaluated, figure: str, confidence: float = CONFIDENCE) -> Row | None:
    """A figure that both evaluations have; None where either has no finite value of it."""
    pairs = _paired(one, two, figure)
    if pairs:
        values = [a for a, _ in pairs], [b for _, b in pairs]
        difference = estimate([b - a for a, b in pairs], confidence)
    else:
        values = _finite(one, figure), _finite(two, figure)
        difference = welch(*values, confidence)
    if difference is None:
        return None
    higher = better_when_higher(figure)
    better = None if higher is None else difference.sign * (1 if higher else -1) if pairs else 0
    means = sum(values[0]) / len(values[0]), sum(values[1]) / len(values[1])
    left_out = len(one.prompts) + len(two.prompts) - 2 * len(_matched(one, two))
    return Row(figure, (one.step, two.step), means, difference, bool(pairs), alike(one, two), better, left_out)


def _matched(one: Evaluated, two: Evaluated) -> list[tuple[int, int]]:
    """Places of what both were evaluated on. The same set pairs place by place; of different ones (another number of
    prompts, say) those whose prompt comes once in each."""
    if alike(one, two):
        return [(place, place) for place in range(len(one.prompts))]
    often = Counter(one.prompts), Counter(two.prompts)
    places = {prompt: place for place, prompt in enumerate(one.prompts) if often[0][prompt] == 1}
    return [(places[each], at) for at, each in enumerate(two.prompts) if each in places and often[1][each] == 1]


def alike(one: Evaluated, two: Evaluated) -> bool:
    """Whether both are of the same prompts, pictures and pairs, in the same order, as far as that is known."""
    return one.digest == two.digest != "" and one.prompts == two.prompts


def _paired(one: Evaluated, two: Evaluated, figure: str) -> list[tuple[float, float]]:
    both = [(one.scores[figure][i], two.scores[figure][j]) for i, j in _matched(one, two)]
    return [(a, b) for a, b in both if a is not None and b is not None]


def _finite(evaluated: Evaluated, figure: str) -> list[float]:
    return [value for value in evaluated.scores[figure] if value is not None]


def _at_common_step(first: Run, second: Run, rows: Sequence[Row]) -> list[str]:
    """The same where both have had as many steps, if they end at different ones."""
    lines = []
    for row in rows:
        common = {one.step for one in first.evaluations} & {one.step for one in second.evaluations}
        if row.steps[0] != row.steps[1] and common:
            one, two = (run.evaluated(row.figure, max(common)) for run in (first, second))
            there = None if one is None or two is None else row_of(one, two, row.figure)
            if there is not None:
                lines.append(f"At step {max(common)}: {_sentence((first, second), 0, 1, there, CONFIDENCE)}")
    return lines


def _sentence(runs: Sequence[Run], one: int, two: int, row: Row, confidence: float) -> str:
    """The verdict of one figure, from the better run's side where there is one."""
    first, second = runs[one], runs[two]
    if not row.paired:
        return (
            f"It cannot be told whether {first.name} or {second.name} is better: they were evaluated on other prompts. "
            f"{_numbers(row, flipped=False)}, {_interval(row.difference, False, confidence)}, which may lie in the "
            "prompts alone"
        )
    flipped = row.better == -1
    prompts = counted(row.difference.count, "prompt")
    figures = f"{_numbers(row, flipped)}, {_interval(row.difference, flipped, confidence)}, paired over {prompts}"
    if row.better:
        winner, other = (first, second) if flipped else (second, first)
        return f"{winner.name} is better than {other.name}: {figures}"
    if row.same:
        return f"{first.name} and {second.name} are the same on {prompts}: {label(row.figure)} {number(row.means[0])}"
    return f"It cannot be told whether {first.name} or {second.name} is better: {figures}"


def _numbers(row: Row, flipped: bool) -> str:
    first, second = row.means if not flipped else row.means[::-1]
    spec = spec_for(row.difference)
    return f"{label(row.figure)} {number(second, spec)} against {number(first, spec)}"


def _interval(difference: Estimate, flipped: bool, confidence: float) -> str:
    sign, spec = (-1 if flipped else 1), spec_for(difference)
    by = f"{number(sign * difference.mean, f'+{spec}')}"
    if difference.low is None or difference.high is None:
        return f"{by} (one prompt has no interval)"
    low, high = sorted((sign * difference.low, sign * difference.high))
    level = f"{100 * confidence:.3g} %"
    return f"{by} ({level} interval {number(low, f'+{spec}')} to {number(high, f'+{spec}')})"


def spec_for(difference: Estimate) -> str:
    """A format in which a difference of this size, or how sure it is, is seen."""
    wide = 0.0 if difference.low is None or difference.high is None else difference.high - difference.low
    size = max(abs(difference.mean), wide / 2)
    bounds = ((0.01, ".3f"), (1e-3, ".4f"), (1e-4, ".5f"), (1e-5, ".6f"), (1e-6, ".7f"))
    return ".3f" if size == 0 else next((spec for bound, spec in bounds if size >= bound), ".2e")


def _of_two(names: Sequence[str], rows: Sequence[Row], lines: Sequence[str]) -> str:
    """The first line of a comparison: that of the deciding figure, unless several speak against each other."""
    if not rows:
        return "It cannot be told which is better: a run has no finite score of what both were evaluated by"
    signs = {row.better for row in rows if row.better}
    if len(signs) < 2:
        return lines[0]
    by = {sign: " and ".join(label(row.figure) for row in rows if row.better == sign) for sign in (1, -1)}
    return f"Neither is better: {names[1]} in {by[1]}, {names[0]} in {by[-1]}. {lines[0]}"


def _of_many(
    runs: Sequence[Run], figure: str, found: dict[tuple[int, int, str], Row | None], confidence: float
) -> tuple[str, list[str], list[Row]]:
    """The headline of more than two runs, a line for each of the others against the best, and those rows."""
    higher = better_when_higher(figure)
    means = [(_mean(run, figure), place) for place, run in enumerate(runs)]
    known = [(mean, place) for mean, place in means if mean is not None]
    if len(known) < 2 or higher is None:
        return "It cannot be told which is best: fewer than two runs have a finite score", [], []
    best = (max if higher else min)(known)[1]
    places = [(place, mean) for mean, place in known]
    lines, rows, beaten = [], [], []
    for other in (place for place in range(len(runs)) if place != best):
        one, two = sorted((best, other))
        row = found[one, two, figure]
        if row is not None:
            rows.append(row)
            lines.append(_sentence(runs, one, two, row, confidence))
            beaten.append((row.better or 0) == (1 if two == best else -1))
    name = runs[best].name
    if all(beaten) and len(beaten) == len(runs) - 1:
        return f"{name} is the best of {len(runs)}: {label(figure)} {number(dict(places)[best])}", lines, rows
    some = f"{name} has the best mean ({label(figure)} {number(dict(places)[best])})"
    worse = f"{counted(sum(beaten), 'run')} of the other {len(runs) - 1} can be told to be worse"
    return f"It cannot be told which of {len(runs)} is best: {some}; {worse}", lines, rows


def _mean(run: Run, figure: str) -> float | None:
    evaluated = run.evaluated(figure)
    found = None if evaluated is None else estimate(_finite(evaluated, figure))
    return None if found is None else found.mean


def _standings(runs: Sequence[Run]) -> list[str]:
    """Where each run is."""
    lines = []
    for run in runs:
        total = "" if run.total_steps is None else f" of {run.total_steps}"
        scored = f", evaluated last at step {run.evaluations[-1].step}" if run.evaluations else ""
        lines.append(f"{run.name}: {run.state}, step {run.step}{total}{scored}")
    return lines


def _warnings(runs: Sequence[Run], rows: Sequence[Row], settings: dict[str, list[Any]]) -> list[str]:
    """What makes the comparison worth less."""
    lines = []
    if len({step for row in rows for step in row.steps}) > 1:
        lines.append("The runs were evaluated after different numbers of steps")
    if any(row.paired and not row.alike for row in rows):
        lines.append("The evaluation sets are not known to be the same: prompts are matched by their text alone")
    left_out = max((row.left_out for row in rows if row.paired), default=0)
    if left_out:
        lines.append(f"Left out: {counted(left_out, 'prompt')} that only one of two runs was evaluated on")
    drawn = [key for key in settings if any(key == each or key.startswith(f"{each}.") for each in DRAWN_BY)]
    if drawn and rows:
        told = _listed({key: settings[key] for key in drawn})
        lines.append(f"The evaluations draw their pictures otherwise, which may be the reason ({told})")
    subjects = {one.on for run in runs for one in run.evaluations if one.on.endswith("prompts")}
    if any(subject.startswith("training") for subject in subjects):
        lines.append(
            "Evaluated on training prompts: what was learned by heart counts too (evaluation.eval_prompts_file)"
        )
    if rows:
        lines.append("The interval is over prompts, of these runs: another seed of training may turn out otherwise")
    return lines


def differing(configurations: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Keys whose values are not the same in all, with the value of each; None where one lacks it."""
    keys = dict.fromkeys(key for each in configurations for key in each)
    found = {key: [each.get(key) for each in configurations] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def shown(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    return str(value)
