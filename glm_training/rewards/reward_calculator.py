"""The reward: weighted metrics over a batch of generated images, or a user's own one-sample function."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from glm_training.rewards.aesthetic import Aesthetic
from glm_training.rewards.clip_scores import ClipScore, PickScore
from glm_training.rewards.custom import (
    CUSTOM,
    FIGURES,
    SAMPLES,
    check_hooks,
    check_overrides,
    class_at,
    is_class_spec,
    load_class,
    score_batch,
    score_samples,
    stop_at,
)
from glm_training.rewards.foreign import shown, users_code
from glm_training.rewards.hps_v2 import HpsV2
from glm_training.rewards.lpips_similarity import LpipsSimilarity
from glm_training.rewards.objects import Objects
from glm_training.rewards.options import RewardOptions
from glm_training.rewards.remote import RemoteReward
from glm_training.rewards.structure import Structure
from glm_training.rewards.text_accuracy import TextAccuracy
from glm_training.rewards.types import (
    Metric,
    MetricScores,
    RewardBackendError,
    RewardBatch,
    RewardConfigError,
    RewardResult,
    check_weights,
    exactly_right,
    from_pil,
    load_all,
    spread,
    unusable_images,
    weighted_total,
)
from glm_training.utils.hub_files import Wanted
from glm_training.utils.words import counted

METRICS = ("lpips", "aesthetic", "text_accuracy", "objects", "structure", "clip_score", "pick_score", "hps_v2")
REMOTE_PREFIX = "remote/"
TAKEN = FIGURES | {*METRICS, CUSTOM, "exactly_right"}
"""Names that a metric of the user's cannot have: of our metrics, and of the figures beside them in `reward/<name>`."""


@dataclass
class PromptReport:
    """What ``RewardCalculator.check_prompts`` found.

    problems: training would fail or a metric could never count. notes: worth a line in the log. applies: metric -> how
    many samples it scores.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    applies: dict[str, int] = field(default_factory=dict)


class RewardCalculator:
    """Scores generated images.

    weights: metric -> relative weight (>= 0). A metric is one of ``METRICS``, "remote/<name>" for a server of
    ``options.remote``, or "module:Class" or "path/to/file.py:Class" naming a RewardCalculator subclass whose
    ``compute_reward`` or ``compute_rewards`` gives that component; it is called by the ``name`` of the class, or as the
    class is called. ``names`` says how each metric is called, and ``weights`` is by these names. Weight 0 scores and
    logs a metric without counting it. A sample's total is ``sum_i w_i r_i / sum_i w_i`` over the metrics i that apply
    to it.

    To write a reward of your own, subclass and override ``compute_reward``; a trainer that is given the subclass calls
    it for every sample and reports the one component "custom". A subclass needs no ``__init__``, and one that has its
    own need not call this one. Raises RewardConfigError for unknown metrics or impossible weights; loads nothing yet.
    """

    weights: Mapping[str, float] = {}
    names: Mapping[str, str] = {}
    options: RewardOptions = RewardOptions()
    device: torch.device = torch.device("cpu")
    _metrics: Mapping[str, Metric] = {}

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        options: RewardOptions | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.options = options or RewardOptions()
        self.device = torch.device(device)
        built = {spec: _build_metric(spec, self.options, self.device) for spec in weights or {}}
        self.names = metric_names(built)
        self.weights = {self.names[spec]: weight for spec, weight in (weights or {}).items()}
        self._metrics = {self.names[spec]: metric for spec, metric in built.items()}
        if self.weights or not self.is_custom:
            check_weights(self.weights, self._metrics)

    @property
    def _has_own_hook(self) -> bool:
        return type(self).compute_reward is not RewardCalculator.compute_reward

    @property
    def is_custom(self) -> bool:
        """Whether a subclass scores by itself, perhaps without any of the metrics."""
        return self._has_own_hook or type(self).compute_rewards is not RewardCalculator.compute_rewards

    def compute_reward(self, generated_image: Image.Image, target_image: Image.Image | None, prompt: str) -> float:
        """The reward of one sample; override this. Here: the weighted total of the metrics (no source image).

        generated_image, target_image: RGB; target_image is None when the data set has none. Higher is better. Raise
        RewardSampleError for a sample that cannot be scored.
        """
        target = None if target_image is None else from_pil(target_image)
        return self._score_metrics(RewardBatch(from_pil(generated_image), [prompt], target)).total.item()

    def compute_rewards(self, batch: RewardBatch) -> RewardResult:
        """Score a batch; what trainers call.

        Raises RewardSampleError when a sample cannot be scored (with ``on_error="skip"`` it gets a NaN total instead),
        RewardBackendError when a metric's backend is missing, RewardError when no metric applies to some sample.
        """
        unusable = unusable_images(batch)
        if not self._has_own_hook:
            return self._score_metrics(batch, unusable)
        rows = [row for row in range(len(batch)) if row not in unusable]
        scores = score_samples(self.compute_reward, batch.select(rows), type(self).__name__)
        values, failures = spread(scores, rows, len(batch))
        failures |= unusable
        stop_at(failures, batch, self.options.on_error)
        values[sorted(failures)] = math.nan
        return RewardResult(values.clone(), {CUSTOM: values}, failures)

    def wanted(self) -> list[Wanted]:
        """Files of the metrics that can be fetched; of a subclass that scores by itself none."""
        return [] if self.is_custom else [file for metric in self._metrics.values() for file in metric.wanted()]

    def check(self) -> None:
        """Load every metric's backend. Raises one RewardBackendError that lists all that are missing, with remedies.

        A subclass with its own ``compute_reward`` or ``compute_rewards`` may use none of the metrics, so theirs load on
        first use.
        """
        if self.is_custom:
            return
        load_all(metric.check for metric in self._metrics.values())

    def check_prompts(
        self,
        prompts: Sequence[str],
        has_targets: bool | Sequence[bool],
        has_sources: bool | Sequence[bool],
        weights: Mapping[str, float] | None = None,
        *,
        places: Sequence[str] | None = None,
    ) -> PromptReport:
        """Which metrics will apply to a data set, before anything is generated, and which quoted text they cannot read.

        has_targets, has_sources: for all samples at once or one per prompt. weights: those of one half in the
        calculator's place (for ``RewardResult.total_for``); they need apply to some samples only. places: what messages
        call the samples, as "line 3"; their index without it.
        """
        report = PromptReport()
        if self.is_custom:
            return report
        targets = [has_targets] * len(prompts) if isinstance(has_targets, bool) else list(has_targets)
        sources = [has_sources] * len(prompts) if isinstance(has_sources, bool) else list(has_sources)
        samples = list(zip(prompts, targets, sources, strict=True))
        own = self.weights if weights is None else {self.names.get(k, k): weight for k, weight in weights.items()}
        check_weights(own, self._metrics)
        counting = {name for name, weight in own.items() if weight > 0}
        bare = set(range(len(prompts)))
        places = [str(row) for row in range(len(prompts))] if places is None else places
        for name, metric in self._metrics.items():
            rows = [row for row, sample in enumerate(samples) if metric.applies(*sample)]
            report.applies[name] = len(rows)
            if isinstance(metric, TextAccuracy) and (line := metric.unreadable_prompts(prompts, places)):
                (report.notes if metric.only_readable or name not in counting else report.problems).append(line)
            if name in counting:
                bare.difference_update(rows)
            if not rows and not any(metric.applies(prompt, True, True) for prompt in prompts):
                report.notes.append(
                    f"{name} applies to none of {counted(len(prompts), 'sample')}: it needs {metric.needs}"
                )
            elif not rows:
                report.problems.append(
                    f"{name} needs {metric.needs}, and no sample has one: provide the images or remove {name} from the "
                    "reward weights"
                )
            elif len(rows) < len(prompts):
                rest = "the other weights are renormalised on the rest"
                if name in counting and len(counting) == 1:
                    rest = "the half that it alone is paid for learns from those"
                report.notes.append(
                    f"{name} applies to {len(rows)} of {counted(len(prompts), 'sample')} (it needs {metric.needs}); "
                    f"{rest}"
                )
        if bare and (weights is None or len(bare) == len(prompts)):
            shown = ", ".join(f"{places[row]} ({prompts[row][:40]!r})" for row in sorted(bare)[:SAMPLES])
            more = f" and {len(bare) - SAMPLES} more" if len(bare) > SAMPLES else ""
            report.problems.append(
                f"no metric of {sorted(counting)} applies to {counted(len(bare), 'sample')}: {shown}{more}; add a "
                "metric that does (aesthetic applies to every image), or remove these prompts"
            )
        return report

    def _score_metrics(self, batch: RewardBatch, unusable: Mapping[int, str] | None = None) -> RewardResult:
        """Totals and components of the metrics; ``unusable`` samples are failures from the start."""
        if not self._metrics:
            raise RewardConfigError("this calculator has no reward weights, so it has no metrics to compute")
        failures = dict(unusable or {})
        has_target, has_source = batch.targets is not None, batch.sources is not None
        components = {}
        for name, metric in self._metrics.items():
            batch.raise_if_stopped()
            rows = [
                row
                for row, prompt in enumerate(batch.prompts)
                if row not in failures and metric.applies(prompt, has_target, has_source)
            ]
            with users_code(f"the metric {name}"):
                scores = metric.score(batch.select(rows)) if rows else MetricScores(torch.zeros(0))
            components[name], failed = spread(scores, rows, len(batch))
            for part, values in scores.parts.items():
                components[f"{name}/{part}"] = torch.full((len(batch),), math.nan)
                components[f"{name}/{part}"][rows] = values
            failures |= {row: f"{name}: {reason}" for row, reason in failed.items()}
        stop_at(failures, batch, self.options.on_error)
        for values in components.values():
            values[sorted(failures)] = math.nan
        total = weighted_total(components, self.weights, failures)
        right = exactly_right(components, self.weights)
        if right is not None:
            right[sorted(failures)] = math.nan
            components["exactly_right"] = right
        return RewardResult(total, components, failures, self.names)


def metric_names(metrics: Mapping[str, Metric]) -> dict[str, str]:
    """How each metric, by what the configuration writes, is called in figures and tables: one of the user's own by its
    name, any other as it is written. Raises RewardConfigError where two are called alike."""
    names = {spec: metric.name if isinstance(metric, _CustomMetric) else spec for spec, metric in metrics.items()}
    owners: dict[str, str] = {}
    for spec, name in names.items():
        if name in owners:
            raise RewardConfigError(
                f"two metrics are called {name!r}: {owners[name]} and {spec}; give one of the classes another `name`"
            )
        owners[name] = spec
    return names


class _CustomMetric:
    """A RewardCalculator subclass used as one component."""

    needs = "nothing"

    def __init__(self, spec: str) -> None:
        kind = _calculator_class(spec)
        try:
            inspect.signature(kind).bind()
        except TypeError as error:
            raise RewardConfigError(f"reward {spec!r} must be constructible without arguments: {error}") from error
        with users_code(f"reward {spec!r}: {kind.__name__}.__init__", RewardConfigError):
            self._calculator: RewardCalculator = kind()
            self._calculator.options = RewardOptions(on_error="skip")  # what fails is judged with the other metrics
        check_hooks(self._calculator, spec)
        self._whole_batch = kind.compute_rewards is not RewardCalculator.compute_rewards
        with users_code(f"reward {spec!r}: {kind.__name__}.name", RewardConfigError):
            own = getattr(self._calculator, "name", None)
        self.name = own if isinstance(own, str) and own else kind.__name__
        if re.fullmatch(r"[\w.+-]+", self.name) is None or self.name in TAKEN:
            why = "names something else already" if self.name in TAKEN else "has more than letters, digits and . _ - +"
            raise RewardConfigError(
                f"reward {spec!r} is called {shown(self.name, 40)!r}, which {why}; give {kind.__name__} another `name`"
            )

    def wanted(self) -> list[Wanted]:
        """Nothing that is known here."""
        return []

    def check(self) -> None:
        """The user's own check."""
        with users_code(f"{type(self._calculator).__name__}.check", RewardBackendError):
            self._calculator.check()

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Always true."""
        return True

    def score(self, batch: RewardBatch) -> MetricScores:
        """What the class overrides: the batch at once, or sample by sample."""
        if self._whole_batch:
            result = score_batch(self._calculator, batch)
            parts = {name: values for name, values in result.components.items() if name != CUSTOM}
            return MetricScores(result.total, result.failures, parts)
        return score_samples(self._calculator.compute_reward, batch, type(self._calculator).__name__)


def build_calculator(
    spec: str | None,
    weights: Mapping[str, float],
    options: RewardOptions | None = None,
    device: torch.device | str = "cpu",
) -> RewardCalculator:
    """The calculator a trainer uses: ours, or the user's subclass named by ``spec`` ("module:Class" or
    "path/to/file.py:Class"), built with the weights, options and device, or with nothing if it takes nothing.

    Raises RewardConfigError for a class that cannot be found or built.
    """
    if spec is None:
        return RewardCalculator(weights, options=options, device=device)
    kind = _calculator_class(spec)
    signature = inspect.signature(kind)
    arguments: dict[str, Any] = {"weights": weights, "options": options, "device": device}
    try:
        signature.bind(**arguments)
    except TypeError:
        arguments = {}
        try:
            signature.bind()
        except TypeError as error:
            raise RewardConfigError(
                f"reward {spec!r}: its __init__ must take (weights, options, device) or nothing, not {signature}"
            ) from error
    with users_code(f"reward {spec!r}: {kind.__name__}.__init__", RewardConfigError):
        calculator = kind(**arguments)
        if options is not None:
            calculator.options = options  # it need not have kept them
    check_hooks(calculator, spec)
    return calculator


def _calculator_class(spec: str) -> type[RewardCalculator]:
    found = load_class(spec)
    if not issubclass(found, RewardCalculator):
        raise RewardConfigError(
            f"reward {spec!r}: {found.__name__} must be a subclass of RewardCalculator{class_at(found)}, which is "
            "imported from glm_training.rewards"
        )
    check_overrides(found, RewardCalculator, spec)
    return found


def _build_metric(name: str, options: RewardOptions, device: torch.device) -> Metric:
    if name == "lpips":
        return LpipsSimilarity(options.lpips, device)
    if name == "aesthetic":
        return Aesthetic(options.aesthetic, device)
    if name == "text_accuracy":
        return TextAccuracy(options.text_accuracy, only_readable=options.on_error == "skip")
    if name == "objects":
        return Objects(options.objects)
    if name == "structure":
        return Structure(options.structure, device)
    if name == "clip_score":
        return ClipScore(options.clip_score, device)
    if name == "pick_score":
        return PickScore(options.pick_score, device)
    if name == "hps_v2":
        return HpsV2(options.hps_v2, device)
    if is_class_spec(name):
        return _CustomMetric(name)
    remote = {f"{REMOTE_PREFIX}{key}": value for key, value in options.remote.items()}
    if name in remote:
        return RemoteReward(name, remote[name])
    nearest = difflib.get_close_matches(name, (*METRICS, *remote), n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    allowed = f"{', '.join((*METRICS, *remote))}, module:Class and path/to/file.py:Class"
    raise RewardConfigError(f"unknown reward metric {name!r}: allowed are {allowed}{hint}")
