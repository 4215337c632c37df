"""Folders of runs as they are on disk, written without a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from glm_training.utils.kept_rollouts import KeptRollout, RolloutFolder


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


def write_large_run(folder: Path, steps: int = 2000, pictures: int = 200, size: int = 256) -> Path:
    """A run of reward training with a line per step, so many sample pictures, kept rollouts, monitors on their way."""
    rng = np.random.default_rng(0)
    grow = 1 - np.exp(-np.arange(1, steps + 1) / (steps / 3))
    lines: list[dict[str, Any]] = []
    every = steps // 20
    prompts = [f'a {("red", "blue", "green")[i % 3]} sign that says "WORD {i}"' for i in range(64)]
    base = rng.normal(0.5, 0.15, len(prompts))
    evaluations: dict[int, dict[str, list[float | None]]] = {}
    for step in range(steps + 1):
        if step:
            rise = float(grow[step - 1])
            noise = rng.normal(0, 1, 24)
            parts = {"objects": 0.5 + 0.35 * rise, "text_accuracy": 0.4 + 0.3 * rise, "objects/color": 0.4 + 0.5 * rise}
            line = {f"reward/{name}": value + 0.06 * noise[k] for k, (name, value) in enumerate(parts.items())}
            line |= {"reward/total": 0.45 + 0.33 * rise + 0.05 * noise[4], "reward/exactly_right": 0.2 + 0.4 * rise}
            line |= {"reward/group_std": 0.2 - 0.08 * rise, "reward/plan_variance_share": 0.62 + 0.05 * noise[5]}
            line |= {"reward/zero_spread_groups": float(abs(int(noise[6]))), "reward/skipped_samples": 0.0}
            line |= {
                "ar/loss": 0.001 * noise[7],
                "ar/kl": 0.08 * rise + 0.002 * abs(noise[8]),
                "dit/loss": 1.2 - 0.2 * rise,
            }
            line |= {
                "dit/kl": 0.003 * rise,
                "ar/clip_fraction": 0.01 * abs(noise[9]),
                "ar/approx_kl": 1e-4 * abs(noise[10]),
            }
            line |= {"ar/grad_norm": 0.2 * abs(noise[11]) + 0.1, "dit/grad_norm": 0.3 * abs(noise[12]) + 0.1}
            line |= {"ar/learning_rate": 2e-4, "dit/learning_rate": 1e-4, "ar/ratio_deviation_max": abs(noise[13])}
            line |= {
                "monitor/brightness": 0.6 + 0.18 * rise + 0.01 * noise[14],
                "monitor/saturation": 0.3 + 0.01 * noise[15],
            }
            line |= {
                "monitor/edges": 0.03 - 0.008 * rise,
                "monitor/clipped": 0.02 * rise,
                "monitor/diversity": 0.2 - 0.09 * rise,
            }
            line |= {"images_per_second": 4 + 0.2 * noise[16], "tokens_per_second": 3000 + 50 * noise[17]}
            line |= {"time/rollout_seconds": 8 + 0.3 * noise[18], "time/reward_seconds": 2 + 0.1 * noise[19]}
            line |= {"time/ar_update_seconds": 5 + 0.2 * noise[20], "time/dit_update_seconds": 4 + 0.2 * noise[21]}
            line |= {
                "time/step_seconds": 19.5 + 0.4 * noise[22],
                "memory/allocated_gib_max": 61.3,
                "memory/reserved_gib_max": 68.0,
            }
            lines.append({"step": step, **{key: float(value) for key, value in line.items()}})
        if step % every == 0:
            rise = step / steps
            total = np.clip(base + 0.28 * rise * (2 - rise) + rng.normal(0, 0.05, len(base)), 0, 1)
            right = (rng.random(len(base)) < 0.25 + 0.4 * rise).astype(float)
            scores = {"total": total, "exactly_right": right, "objects": total, "text_accuracy": total * 0.8}
            evaluations[step] = {name: [round(float(v), 6) for v in values] for name, values in scores.items()}
            means = {f"eval/{name}": float(np.mean(values)) for name, values in scores.items()}
            gaps = {"gap/total": 0.02, "gap_change/total": 0.01 * rise, "monitor/picture_change": 0.3 * rise}
            lines.append({"step": step, **means, **gaps})
    write_run(folder, evaluations, prompts=prompts, figures=lines, total_steps=steps, reward__metrics={"objects": 1.0},
              reward__monitors={"brightness_change": 0.4, "window": 5}, logging__log_interval=1)  # fmt: skip
    each = 10
    for place in range(pictures // each):
        step = round(place * steps / max(1, pictures // each - 1))
        sampled = folder / "samples" / f"step-{step:06d}"
        sampled.mkdir(parents=True)
        for i in range(each):
            picture(size, i, place).save(sampled / f"{i}.png")
        (sampled / "prompts.txt").write_text("\n".join(prompts[:each]) + "\n", encoding="utf-8")
    rollouts = RolloutFolder(folder / "rollouts", 64 << 20)
    for step in (1, steps // 2, steps):
        rows = 4 * 3 * 4
        total = [round(float(v), 4) for v in rng.random(rows)]
        advantages = (
            [round(float(v), 4) for v in rng.normal(0, 1, 12)],
            [round(float(v), 4) for v in rng.normal(0, 1, rows)],
        )
        kept = KeptRollout(step, 16, prompts[:4], 3, 4, {"total": total, "objects": total[::-1]}, *advantages)
        rollouts.write(kept, [picture(128, row, step) for row in range(rows)])
    return folder


def picture(size: int, kind: int, shade: int) -> Image.Image:
    """A shape on a slope of grey, as compressible as a photograph."""
    y, x = np.mgrid[0:size, 0:size] / size
    noise = np.random.default_rng(kind * 1000 + shade).normal(0, 6, (size, size, 3))
    image = np.stack([190 + 50 * x, 190 + 40 * y, 200 + 0 * x], axis=-1) + noise
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < (0.1 + 0.02 * (kind % 8)) ** 2
    image[inside] = [[200, 60, 50], [50, 80, 190], [40, 140, 80]][kind % 3]
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))
