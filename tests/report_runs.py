"""Folders of runs as they are on disk, written without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(
    folder: Path,
    evaluations: Mapping[int, Mapping[str, Sequence[float | None]]] | None = None,
    *,
    prompts: Sequence[str] | None = None,
    figures: Sequence[Mapping[str, Any]] | None = None,
    on: str = "held-out prompts",
    digest: str = "",
    total_steps: int | None = None,
    **settings: Any,
) -> Path:
    """A run whose evaluation after each step gives these scores per prompt; `settings` as `section__key`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, scores in (evaluations or {}).items():
        count = len(next(iter(scores.values())))
        named = list(prompts or [f"prompt {i}" for i in range(count)])
        lines.append(
            {
                "step": step,
                "on": on,
                "digest": digest,
                "prompts": named,
                "scores": {k: list(v) for k, v in scores.items()},
            }
        )
    if lines:
        write_lines(folder / "evaluations.jsonl", lines)
    last = max(evaluations, default=0) if evaluations else 1
    write_lines(folder / "metrics.jsonl", figures or [{"step": last, "reward/total": 0.5, "time/step_seconds": 1.0}])
    tree: dict[str, Any] = {"output_dir": str(folder)}
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    if total_steps is not None:
        write_lines(folder / "sessions.jsonl", [{"step": 0, "total_steps": total_steps}])
    return folder
