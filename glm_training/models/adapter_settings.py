"""What an adapter says of itself, read as PEFT reads it: defaults of its LoraConfig, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CONFIG = "adapter_config.json"
DEFAULT_RANK = DEFAULT_ALPHA = 8
"""PEFT's `r` and `lora_alpha` where settings leave them out."""


def settings_of(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """In PEFT's file beside the weights, or in the header of diffusers' file; nothing where neither tells anything."""
    if (folder / CONFIG).is_file():
        return dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return {name.partition(".")[2]: value for name, value in told.items()}


def alpha_told(settings: Mapping[str, Any], rank: int) -> float:
    """Of all layers without a pattern: PEFT's default where settings leave it out, and the rank, as in diffusers, where
    there are no settings."""
    return float(settings.get("lora_alpha", DEFAULT_ALPHA) if settings else rank)


def by_pattern(settings: Mapping[str, Any], key: str, layer: str) -> Any | None:
    """The value of the first pattern under `key` that the name of `layer` ends with; None where there is none."""
    patterns: Mapping[str, Any] = settings.get(key) or {}
    return next((each for pattern, each in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer)), None)


def faults(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT would refuse in the settings of the adapter in `folder`, each with its key."""
    named = (folder / CONFIG).is_file()
    kind = settings.get("peft_type", None if named else "LORA")
    if kind != "LORA":
        yield f"peft_type is {_shown(kind)}, and adapters of LORA alone are read here"
    ranks = {"r": settings.get("r", DEFAULT_RANK)} | _entries(settings, "rank_pattern")
    for key, value in ranks.items():
        if type(value) is not int:
            yield f"{key} is {_shown(value)}, and no whole number"
    alphas = {"lora_alpha": settings.get("lora_alpha", DEFAULT_ALPHA)} | _entries(settings, "alpha_pattern")
    for key, value in alphas.items():
        if type(value) not in (int, float):
            yield f"{key} is {_shown(value)}, and no number"


def unlike_its_weights(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> str | None:
    """Which layer's weights have another rank than `r` or `rank_pattern` says; `ranks`: of the weights, by layer."""
    if not settings:
        return None
    for layer, rank in ranks.items():
        own = by_pattern(settings, "rank_pattern", layer)
        told = settings.get("r", DEFAULT_RANK) if own is None else own
        if told != rank:
            return f"{'r' if own is None else 'rank_pattern'} is {told}, and the weights of {layer} have rank {rank}"
    return None


def _entries(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {f"{key}: {pattern}": value for pattern, value in (settings.get(key) or {}).items()}


def _shown(value: Any) -> str:
    return "not there" if value is None else json.dumps(value)
