"""Monitors for hacked rewards: plain figures of the samples, KL, held-out metrics and distance from the start.

A reward that rises says little about the pictures. These figures are never trained on; when one leaves its range while
training goes on, somebody should look. What each means: docs/monitors.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glm_training.config import Config
from glm_training.evaluation.held_out import Evaluation
from glm_training.evaluation.image_statistics import NAMES, group_diversity, image_statistics
from glm_training.reinforcement.monitors.limits import METRIC, limits_of
from glm_training.rewards.structure import ssim
from glm_training.utils.distributed import World, gather_tensor
from glm_training.utils.pictures import Pictures


@dataclass
class Series:
    """One figure over the run: its first `window` values, its latest ones, and since when it has been on its way.

    departed: the first step from which on the figure has used more than half of its limit; None before. tripped: the
    step at which it went over, None while it is within. closed: the first values are these, however many they are.
    """

    first: list[float] = field(default_factory=list)
    latest: list[float] = field(default_factory=list)
    departed: int | None = None
    tripped: int | None = None
    closed: bool = False

    def add(self, value: float, window: int) -> bool:
        """Takes a value; whether there is something to compare by now: a full start, and a value after it."""
        complete = self.closed or len(self.first) >= window
        if not complete:
            self.first.append(value)
        self.latest = [*self.latest, value][-window:]
        return complete

    @property
    def start(self) -> float:
        return sum(self.first) / len(self.first)

    @property
    def now(self) -> float:
        return sum(self.latest) / len(self.latest)

    def resized(self, before: int, window: int) -> Series:
        """For another `window` than `before`: a shorter one takes the first of the start, and a longer one leaves a
        start as it is to which later values have come, or whose values are all the same, which cannot tell."""
        if window == before:
            return self
        over = len(self.first) >= before and (self.latest != self.first or len(set(self.first)) == 1)
        closed = self.closed or over or len(self.first) > window
        return replace(self, first=self.first[:window], latest=self.latest[-window:], closed=closed)


class Monitors:
    """Watches a run. `messages` collects what is to be told; `halt` is the reason to stop, None while there is none."""

    def __init__(self, config: Config, world: World, held_out: Sequence[str] | None = None) -> None:
        """`held_out`: the names of `reward.monitors.metrics` among the scores of an evaluation, where they differ."""
        settings = config.reward.monitors
        self.world = world
        self.action = settings.action
        self.window = settings.window
        self.limits = limits_of(settings)
        self.held_out = tuple(settings.metrics if held_out is None else held_out)
        self.active = config.uses_reward()
        self.series: dict[str, Series] = {}
        self.messages: list[str] = []
        self.halt: str | None = None

    # -- what is seen --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look(self, pictures: Sequence[tuple[Tensor, int]]) -> dict[str, float]:
        """Statistics of the samples of a step over all processes, which must all call it: images [B, 3, H, W] on their
        device with the size of their groups. The device is read once."""
        rows = [
            torch.cat(
                [
                    image_statistics(images).unflatten(0, (-1, group)).mean(dim=1),
                    group_diversity(images, group)[:, None],
                ],
                dim=1,
            )
            for images, group in pictures
        ]
        means = gather_tensor(self.world, torch.cat(rows)).mean(dim=0).tolist()
        figures = dict(zip((*NAMES, "diversity"), means, strict=True))
        return {f"monitor/{name}": value for name, value in figures.items() if not math.isnan(value)}

    def after_step(self, step: int, figures: Mapping[str, float]) -> None:
        """Judges the figures of training step `step`: those of `look`, and the KL of each half."""
        for name in ("brightness", "saturation", "clipped", "edges", "diversity"):
            self._judge(step, name, figures.get(f"monitor/{name}"), self.window)
        for half in ("ar", "dit"):
            self._judge(step, f"{half}_kl", figures.get(f"{half}/kl"), self.window)

    def after_evaluation(
        self, step: int, before: Evaluation, now: Evaluation, sources: Pictures | None
    ) -> dict[str, float]:
        """Judges an evaluation against the first one; `sources` of the kept pictures, in i2i. Returns the figures for
        the log."""
        if not self.active:
            return {}
        figures: dict[str, float] = {}
        count = min(len(before.images), len(now.images))
        if count and now is not before:
            figures["monitor/picture_change"] = 1 - _similarity(now.images[:count], before.images[:count])
        if count and sources is not None:  # of the very pictures that are kept
            figures["monitor/source_similarity"] = _similarity(now.images[:count], sources[:count])
        scores = {f"eval/{name}": value for name, value in now.means().items()}
        self._judge_evaluation(step, {**figures, **scores}, before, sources)
        return figures

    def recall(
        self, step: int, logged: Mapping[str, float | None], before: Evaluation, sources: Pictures | None
    ) -> None:
        """Judges an evaluation by what was logged of it, without a word: one that a run made after the checkpoint which
        it now goes on from."""
        if not self.active:
            return
        figures = {name: value for name, value in logged.items() if value is not None}
        messages, halt = list(self.messages), self.halt
        self._judge_evaluation(step, figures, before, sources)
        self.messages, self.halt = messages, halt

    def _judge_evaluation(
        self, step: int, figures: Mapping[str, float], before: Evaluation, sources: Pictures | None
    ) -> None:
        """`figures` as they are logged: those of the pictures, and the scores under `eval/`."""
        self._judge(step, "picture_change", figures.get("monitor/picture_change"), 1)
        if sources is not None and "monitor/source_similarity" in figures:
            count = min(len(before.images), len(sources))
            first = _similarity(before.images[:count], sources[:count])
            self._judge(step, "source_similarity", figures["monitor/source_similarity"], 1, start=first)
        first_means = before.means()
        rising = figures.get("eval/total", math.nan) > first_means.get("total", math.nan)
        for name in self.held_out:
            if f"eval/{name}" in figures and name in first_means:
                now = figures[f"eval/{name}"]
                value = now if rising else max(now, first_means[name])
                self._judge(step, f"{METRIC}{name}", value, 1, start=first_means[name])

    # -- what is made of it --------------------------------------------------------------------------------------------

    def _judge(self, step: int, name: str, value: float | None, window: int, *, start: float | None = None) -> None:
        limit = self.limits.get(name, self.limits.get(METRIC) if name.startswith(METRIC) else None)
        if value is None or limit is None or not self.active:
            return
        series = self.series.setdefault(name, Series())
        if start is not None:
            series.first = [start]
        comparable = series.add(value, window) or limit.absolute
        if not comparable:
            return
        used = limit.used(series.start, series.now)
        if not used <= limit.limit / 2:
            series.departed = step if series.departed is None else series.departed
        else:
            series.departed = None
        if used <= limit.limit:
            if series.tripped is not None:
                self.messages.append(f"the monitor {_label(name)} is back within its limit at step {step}")
            series.tripped = None
            return
        message = limit.message(_label(name), step, series.start, series.now, series.departed or step)
        if series.tripped is None:
            series.tripped = step
            self.messages.append(message)
        if self.action == "stop" and self.halt is None:
            self.halt = message

    def take_messages(self) -> Iterator[str]:
        """Everything there is to be told since the last call."""
        while self.messages:
            yield self.messages.pop(0)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Start values and the latest ones, and of which window, for a checkpoint."""
        return {name: {**asdict(series), "window": self.window} for name, series in self.series.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave, for the window that is set now."""
        self.series = {}
        for name, values in state.items():
            kept = dict(values)
            before = kept.pop("window", self.window)  # those of older versions do not tell it
            self.series[name] = Series(**kept).resized(before, self.window)


def _label(name: str) -> str:
    return f"{name.removeprefix(METRIC)} (not trained on)" if name.startswith(METRIC) else name


def _similarity(images: Pictures, others: Pictures) -> float:
    """Mean SSIM of pairs of pictures, one pair at a time: fp64 copies of large ones add up."""
    pairs = ((image[None].cpu(), other[None].cpu()) for image, other in zip(images, others, strict=True))
    return torch.cat([ssim(image.float(), other.float()) for image, other in pairs]).mean().item()
