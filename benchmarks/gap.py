"""Draws the training and the held-out reward of runs over their steps: mean over the runs, as an SVG.

    python -m benchmarks.gap runs/a runs/b --out benchmarks/results/gap.json --picture docs/images/gap.svg
    python -m benchmarks.gap --out benchmarks/results/gap.json --picture docs/images/gap.svg

The first writes what is drawn to `--out`, the second draws that again. The runs need one configuration, and evaluations
at several steps (`logging.eval_interval`). A point of the training reward is the mean of `--window` steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]
"""(step, reward)."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 16, 36, 44
COLOURS = {"training prompts": "#b3541e", "held-out prompts": "#1f5fa8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--metric", default="total")
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.runs:
        report = {"metric": args.metric, "window": args.window, "runs": len(args.runs)}
        args.out.write_text(json.dumps(report | curves(args.runs, args.metric, args.window), indent=1) + "\n")
    if args.picture:
        args.picture.write_text(svg(json.loads(args.out.read_text())))


def curves(runs: list[Path], metric: str, window: int) -> dict[str, Any]:
    """The mean over the runs of both rewards at the steps that all of them have, and of the logged gaps."""
    training, held_out, gaps, changes = [], [], [], []
    for run in runs:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        training.append(smoothed(points(lines, f"reward/{metric}"), window))
        held_out.append(points(lines, f"eval/{metric}"))
        gaps.append(points(lines, f"gap/{metric}"))
        changes.append(points(lines, f"gap_change/{metric}"))
    names = "training prompts", "held-out prompts", "gap", "change of the gap"
    return {name: mean(each) for name, each in zip(names, (training, held_out, gaps, changes), strict=True)}


def points(lines: list[dict[str, float]], name: str) -> Curve:
    """A logged figure by step."""
    return [(int(line["step"]), line[name]) for line in lines if line.get(name) is not None]


def smoothed(curve: Curve, window: int) -> Curve:
    """The mean of each `window` points, at the middle one's step."""
    ends = range(window, len(curve) + 1)
    parts = [curve[end - window : end] for end in ends]
    return [(part[window // 2][0], statistics.fmean(value for _, value in part)) for part in parts]


def mean(every: list[Curve]) -> Curve:
    """Over several curves, at the steps that all have."""
    by_step = [dict(curve) for curve in every]
    common = sorted(set.intersection(*(set(curve) for curve in by_step)))
    return [(step, round(statistics.fmean(curve[step] for curve in by_step), 4)) for step in common]


def svg(report: dict[str, Any]) -> str:
    """Both curves with axes and their names."""
    drawn = {name: report[name] for name in COLOURS}
    every = [point for curve in drawn.values() for point in curve]
    last = max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    low, high = low - 0.1 * (high - low) - 1e-3, high + 0.1 * (high - low) + 1e-3

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + step / max(1, last) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for i in range(5):
        value = low + (high - low) * (i + 0.5) / 5
        y = place(0, value)[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:.3f}</text>')
    for step in sorted({round(last * i / 4) for i in range(5)}):
        x = place(step, low)[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    for i, (name, curve) in enumerate(drawn.items()):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>')
        if name == "held-out prompts":
            dots = (place(*point) for point in curve)
            parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{COLOURS[name]}"/>' for x, y in dots]
        parts.append(f'<text x="{LEFT + 180 * i}" y="22" fill="{COLOURS[name]}">{name}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    return head + 'font-family="sans-serif" font-size="13" fill="#333">\n' + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    main()
