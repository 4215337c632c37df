"""How far each monitored figure may move, and what is said when it goes further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm_training.config.sections.monitors import MonitorsConfig

METRIC = "metric:"
"""What precedes the name of a held-out metric among the monitors."""

Kind = Literal["change", "share", "rise", "fall", "relative_fall", "value"]


@dataclass(frozen=True)
class Limit:
    """A limit on one figure. `key` is its key under `reward.monitors`; `meaning` and `remedy` are for the user.

    kind "change": |now / start - 1|; "relative_fall": 1 - now / start; "rise", "fall": difference; "value": itself.
    "share", of a figure in [0, 1]: |now - start| relative to the end that the start is nearer to, so that a picture
    which is light from the start can still grow too light.
    """

    key: str
    limit: float
    kind: Kind
    meaning: str
    remedy: str

    @property
    def absolute(self) -> bool:
        """Whether it needs no start value."""
        return self.kind == "value"

    def used(self, start: float, now: float) -> float:
        """How much of the limit is used; NaN counts as all of it, and a start of zero as the smallest number."""
        base = self._base(start)
        amount = {
            "change": abs(now - start) / base,
            "share": abs(now - start) / base,
            "relative_fall": (start - now) / base,
            "rise": now - start,
            "fall": start - now,
            "value": now,
        }[self.kind]
        return amount if amount == amount else float("inf")

    def _base(self, start: float) -> float:
        """What a relative change is relative to."""
        return max(min(abs(start), 1 - start) if self.kind == "share" else abs(start), 1e-6)

    def bounds(self, start: float) -> tuple[float | None, float | None]:
        """The lowest and the highest value that is within the limit, from `start` on; None where there is no end."""
        room = self.limit * (self._base(start) if self.kind in ("change", "share", "relative_fall") else 1)
        if self.kind == "value":
            return None, self.limit
        low = None if self.kind == "rise" else start - room
        high = None if self.kind in ("fall", "relative_fall") else start + room
        return low, high

    def message(self, name: str, step: int, start: float, now: float, since: int) -> str:
        """What happened, by how much, since when, what it may mean and what to do."""
        used = self.used(start, now)
        if self.kind in ("change", "share", "relative_fall"):
            signed = f"{(now - start) / self._base(start):+.0%}"
            if self.kind == "share" and start > 0.5:
                signed += " of the distance to 1"
            by = f"{signed}, allowed {'' if self.kind == 'relative_fall' else '+/-'}{self._allowed()}"
        else:
            by = f"{'-' if self.kind == 'fall' else ''}{used:.3g}, allowed {self._allowed()}"
        origin = "" if self.absolute else f" from {start:.3g} at the start"
        return (
            f"monitor {name}: {now:.3g} at step {step}{origin} ({by}); more than half of that since step {since}. "
            f"{self.meaning} {self.remedy} The limit is reward.monitors.{self.key}"
        )

    def _allowed(self) -> str:
        if self.kind in ("change", "share"):
            return f"{self.limit:.0%}"
        if self.kind == "relative_fall":
            return f"-{self.limit:.0%}"
        return f"-{self.limit:.3g}" if self.kind == "fall" else f"{self.limit:.3g}"


LOOK = "Look at samples/ of this run."
TEXTS: dict[str, tuple[str, Kind, str, str]] = {
    "brightness": (
        "brightness_change",
        "share",
        "The samples grow brighter or darker as a whole, which many scores take for quality.",
        f"{LOOK} Add a metric that does not like it, raise reward.grpo.kl_coef or lower the learning rate.",
    ),
    "saturation": (
        "saturation_change",
        "share",
        "The colours grow garish or fade, a usual way to please an aesthetic score.",
        f"{LOOK} Raise reward.grpo.kl_coef, lower that metric's weight or the learning rate.",
    ),
    "edges": (
        "edges_change",
        "change",
        "The samples grow noisy or over-sharp (up), or blurred and empty (down).",
        f"{LOOK} Raise reward.grpo.kl_coef for the DiT half, or add a metric of structure.",
    ),
    "clipped": (
        "clipped_rise",
        "rise",
        "Ever more of the samples is pure white or black.",
        f"{LOOK} The reward likes empty pictures, or the learning rate is too high.",
    ),
    "diversity": (
        "diversity_fall",
        "relative_fall",
        "The samples of a prompt grow alike: the policy collapses, and groups have nothing left to compare.",
        "Raise reward.grpo.kl_coef (AR: or the sampling temperature), or lower the learning rate.",
    ),
    "ar_kl": (
        "ar_kl",
        "value",
        "The AR half has moved far from its reference.",
        "Raise reward.grpo.ar.kl_coef, or lower training.ar_learning_rate.",
    ),
    "dit_kl": (
        "dit_kl",
        "value",
        "The DiT half has moved far from its reference.",
        "Raise reward.grpo.dit.kl_coef, or lower training.dit_learning_rate.",
    ),
    METRIC: (
        "metric_fall",
        "fall",
        "It falls while the trained score rises: what is gained there is lost elsewhere.",
        "Train on it too with a small weight, or stop at an earlier checkpoint.",
    ),
    "picture_change": (
        "picture_change",
        "value",
        "With the same noise the model draws other pictures than at the start (1 - SSIM).",
        f"{LOOK} Where a new composition is not what was asked for, raise reward.grpo.kl_coef.",
    ),
    "source_similarity": (
        "source_fall",
        "fall",
        "The edited pictures follow their sources less than at the start (SSIM).",
        "Add the metric structure with reference source, or raise its weight.",
    ),
}


def limits_of(settings: MonitorsConfig) -> dict[str, Limit]:
    """The limits that are switched on, by the figure they watch."""
    limits = {
        "brightness": settings.brightness_change,
        "saturation": settings.saturation_change,
        "edges": settings.edges_change,
        "clipped": settings.clipped_rise,
        "diversity": settings.diversity_fall,
        "ar_kl": settings.ar_kl,
        "dit_kl": settings.dit_kl,
        METRIC: settings.metric_fall,
        "picture_change": settings.picture_change,
        "source_similarity": settings.source_fall,
    }
    return {name: Limit(TEXTS[name][0], limit, *TEXTS[name][1:]) for name, limit in limits.items() if limit is not None}
