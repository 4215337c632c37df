"""What rewards exchange: the batch that is scored, the result, what a metric is, and the errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from glm_training.utils.hub_files import Wanted

LARGEST_SCORE = torch.finfo(torch.float32).max
"""Size of the largest score: what follows computes in fp32."""


class RewardError(Exception):
    """Any problem with a reward; the message says what is wrong and what to do."""


class RewardConfigError(RewardError, ValueError):
    """The asked-for metrics, weights or options make no sense."""


class RewardBackendError(RewardError):
    """A metric's program, package or weights are missing; the message names the remedy."""


class RewardServiceError(RewardError):
    """A remote reward gave no usable answer, after retries where they may help."""


class RewardSampleError(RewardError):
    """One sample cannot be scored. With ``on_error="skip"`` the sample is left out instead of ending the run."""


class ScoringStopped(Exception):
    """A stop was asked for while scores were computed; what was scored so far is dropped."""


def _never() -> bool:
    return False


def load_all(loads: Iterable[Callable[[], Any]]) -> list[Any]:
    """What each of ``loads`` returns. Raises one RewardBackendError that lists the problems of all of them."""
    loaded, problems = [], []
    for load in loads:
        try:
            loaded.append(load())
        except RewardBackendError as error:
            problems.append(str(error))
    if problems:
        raise RewardBackendError("\n".join(problems))
    return loaded


@dataclass
class RewardBatch:
    """Generated images and what they are scored against.

    images: [B, 3, H, W] float in [0, 1], any device. prompts: B strings. targets, sources: [B, 3, H', W'] float in
    [0, 1], or None when the data set has none (t2i has no sources). stopped: asked now and then while the batch is
    scored; once it says true, the scoring ends with ScoringStopped. Raises ValueError when the sizes disagree.
    """

    images: torch.Tensor
    prompts: list[str]
    targets: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    stopped: Callable[[], bool] = field(default=_never, repr=False, compare=False)

    def __post_init__(self) -> None:
        count = len(self.prompts)
        for name, images in (("images", self.images), ("targets", self.targets), ("sources", self.sources)):
            if images is not None and (images.ndim != 4 or images.shape[:2] != (count, 3)):
                raise ValueError(
                    f"RewardBatch.{name} must be [{count}, 3, H, W] for {count} prompts, got {list(images.shape)}"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> RewardBatch:
        """The samples ``rows``, in that order."""
        index = torch.tensor(list(rows), dtype=torch.long)

        def pick(images: torch.Tensor | None) -> torch.Tensor | None:
            return None if images is None else images[index.to(images.device)]

        return RewardBatch(
            self.images[index.to(self.images.device)],
            [self.prompts[row] for row in rows],
            pick(self.targets),
            pick(self.sources),
            self.stopped,
        )

    def raise_if_stopped(self) -> None:
        """Raises ScoringStopped once a stop was asked for. Whatever waits or takes long calls it every second or so."""
        if self.stopped():
            raise ScoringStopped


@dataclass
class MetricScores:
    """values: [B] fp32 on the CPU; failures: position in the batch -> why that sample could not be scored. parts:
    further figures [B] by name, which are shown and count in no total; NaN where one does not apply."""

    values: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


class Metric(Protocol):
    """One component of the reward. A calculator calls ``score`` with samples to which the metric applies, only."""

    @property
    def needs(self) -> str:
        """What a sample must have for the metric to apply, in words, for messages."""

    def wanted(self) -> list[Wanted]:
        """Files that the backend loads, where they can be fetched; those that the configuration names are not."""

    def check(self) -> None:
        """Load the backend, or raise RewardBackendError with the remedy."""

    def applies(self, prompt: str, has_target: bool, has_source: bool) -> bool:
        """Whether a sample can be scored at all."""

    def score(self, batch: RewardBatch) -> MetricScores:
        """Raw scores, higher is better. Samples named in ``failures`` may hold any value."""


@dataclass
class RewardResult:
    """total: [B] fp32 on the CPU, NaN for a sample left out under ``on_error="skip"``. components: metric name -> raw
    scores [B] fp32, NaN where the metric does not apply to the sample; beside them "metric/part" for what a metric is
    made of, and "exactly_right", see ``exactly_right``. failures: position -> why it was left out.
    names: metric as the configuration writes it -> its name among the components, where the two differ."""

    total: torch.Tensor
    components: dict[str, torch.Tensor] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def skipped(self) -> int:
        """How many samples were left out."""
        return len(self.failures)

    def total_for(self, weights: Mapping[str, float]) -> torch.Tensor:
        """[B] totals of the same scores under other ``weights`` (how one scoring serves the AR and the DiT part); NaN
        for a sample that none of their metrics applies to."""
        total = _weighted_means(self.components, self.by_name(weights))
        total[sorted(self.failures)] = math.nan
        return total

    def by_name(self, weights: Mapping[str, float]) -> dict[str, float]:
        """``weights`` of metrics as the configuration writes them, by the names of the components."""
        return {self.names.get(metric, metric): weight for metric, weight in weights.items()}

    def means(self) -> dict[str, float]:
        """Plain mean of ``total`` and of each component over the samples that have one; a component that applies to
        no sample of the batch is left out. These are the raw rewards to log."""
        columns = {"total": self.total, **self.components}
        return {name: values.nanmean().item() for name, values in columns.items() if not values.isnan().all()}


def unusable_images(batch: RewardBatch) -> dict[int, str]:
    """Samples whose images hold NaN or infinity. Raises RewardError when values lie outside [0, 1]."""
    unusable: dict[int, str] = {}
    for name, images in (("generated", batch.images), ("target", batch.targets), ("source", batch.sources)):
        if images is None or not len(images):
            continue
        finite = images.isfinite().flatten(1).all(dim=1)
        unusable |= {row: f"its {name} image has non-finite pixels" for row in (~finite).nonzero().flatten().tolist()}
        low, high = (edge.item() for edge in images[finite].aminmax()) if finite.any() else (0.0, 1.0)
        if low < -1e-3 or high > 1 + 1e-3:
            raise RewardError(f"{name} images must lie in [0, 1], found [{low:.3g}, {high:.3g}]")
    return unusable


def spread(scores: MetricScores, rows: Sequence[int], count: int) -> tuple[torch.Tensor, dict[int, str]]:
    """Scores of ``rows`` -> [count] fp32 with NaN elsewhere, and failures by position; a non-finite score is one."""
    values = torch.full((count,), math.nan)
    failures = {rows[position]: reason for position, reason in scores.failures.items()}
    for position, value in enumerate(scores.values.tolist()):
        if rows[position] in failures:
            continue
        if math.isfinite(value):
            values[rows[position]] = value
        else:
            failures[rows[position]] = f"the score is {value}"
    return values, failures


def check_weights(weights: Mapping[str, float], known: Collection[str]) -> None:
    """Raise RewardConfigError unless every weight is finite, >= 0 and of a ``known`` metric, and one is positive."""
    unknown = [name for name in weights if name not in known]
    if unknown:
        raise RewardConfigError(f"reward weights name {unknown}, but the metrics are {list(known)}")
    wrong = {name: weight for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)}
    if wrong:
        raise RewardConfigError(f"reward weights must be finite and >= 0, got {wrong}")
    if not any(weight > 0 for weight in weights.values()):
        raise RewardConfigError(f"reward weights need at least one metric with a weight > 0, got {dict(weights)}")


def weighted_total(
    components: Mapping[str, torch.Tensor], weights: Mapping[str, float], left_out: Mapping[int, str] | None = None
) -> torch.Tensor:
    """Weighted mean per sample over the metrics that apply to it: ``sum_i w_i r_i / sum_i w_i``, i over non-NaN r_i.

    components: name -> [B], NaN = does not apply. Returns [B] fp32; NaN for the positions in ``left_out``.
    Raises RewardError when no metric of positive weight applies to another sample, RewardConfigError for bad weights.
    """
    total = _weighted_means(components, weights)
    dropped = sorted(left_out or {})
    bare = [row for row in total.isnan().nonzero().flatten().tolist() if row not in dropped]
    if bare:
        names = [name for name, weight in weights.items() if weight > 0]
        raise RewardError(
            f"none of the metrics {names} applies to sample(s) {bare} of the batch; "
            "add a metric that does, or remove these prompts"
        )
    total[dropped] = math.nan
    return total


def _weighted_means(components: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """[B] fp32, NaN where no metric of positive weight applies."""
    check_weights(weights, components)
    names = [name for name, weight in weights.items() if weight > 0]
    scores = torch.stack([components[name].double() for name in names])
    scale = torch.tensor([weights[name] for name in names], dtype=torch.float64)[:, None] * ~scores.isnan()
    return ((scale * scores.nan_to_num()).sum(dim=0) / scale.sum(dim=0)).float()


EXACT = ("objects", "text_accuracy")
"""Metrics that give 1 when, and only when, all that they look for is there."""


def exactly_right(components: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor | None:
    """[B] fp32, 1 where every metric of positive weight that applies to a sample gives it 1, else 0, NaN where none
    does; None unless all of them are ``EXACT``."""
    counting = [name for name, weight in weights.items() if weight > 0]
    if not set(counting) <= set(EXACT):
        return None
    scores = torch.stack([components[name] for name in counting])
    right = ((scores >= 1 - 1e-6) | scores.isnan()).all(dim=0).float()
    right[scores.isnan().all(dim=0)] = math.nan
    return right


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] float in [0, 1] -> [B, H, W, 3] uint8 RGB, rounded to nearest."""
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).cpu().numpy())


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """[B, 3, H, W] float in [0, 1] -> B RGB images."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def from_pil(image: Image.Image) -> torch.Tensor:
    """An image -> [1, 3, H, W] fp32 in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
