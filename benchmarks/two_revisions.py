"""Two revisions of this repository train the same things: are their losses identical, and which is faster?

    python benchmarks/two_revisions.py BEFORE AFTER [--rounds 5] [--out benchmarks/results/two_revisions.json]

Each revision is checked out beside the other, and they train in turn (A B, B A, ...), one thread, on the tiny models.
Written down per task: whether every logged figure but times is the same to the last digit, the median seconds of a
step after the first, and their ratio after / before with the range over the rounds. Prints JSON. A change that only
moves code must give identical losses and a ratio within noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = [
    "evaluation.enabled=false",
    "logging.log_images=false",
    "logging.use_tensorboard=false",
    "logging.save_interval=100000",
    "logging.log_interval=1",
]
PLAIN = ["training.use_reward=false", "training.batch_size=8", "training.max_steps=16", "model.name=tiny"]
TASKS: dict[str, tuple[str, list[str]]] = {
    "sft": ("configs/quickstart.yaml", [*PLAIN, *COMMON]),
    "grpo": ("configs/quickstart.yaml", ["training.max_steps=4", "training.batch_size=2", *COMMON]),
    "dpo": ("configs/sdxl_dpo_lora_tiny.yaml", ["training.max_steps=30", *COMMON]),
    "dmdr": ("configs/sdxl_dmdr_cold_start_tiny.yaml", ["training.max_steps=20", *COMMON]),
}
TIMES = ("time/", "images_per_second", "tokens_per_second", "memory/")


def figures(tree: Path, task: str, folder: Path) -> list[dict[str, float]]:
    """The logged lines of one run of `task` by the code in `tree`."""
    config, overrides = TASKS[task]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", "--config", config, *overrides, f"output_dir={folder}"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{task} at {tree} failed:\n{done.stderr}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def first_difference(before: list[dict[str, float]], after: list[dict[str, float]]) -> str | None:
    """In words; None where all figures that both have are the same."""
    if len(before) != len(after):
        return f"{len(before)} lines before, {len(after)} after"
    for one, other in zip(before, after, strict=True):
        for key in one.keys() & other.keys():
            if one[key] != other[key]:
                return f"step {one.get('step')}: {key} {one[key]} before, {other[key]} after"
    return None


def step_seconds(rows: list[dict[str, float]]) -> float:
    return statistics.median(row["time/step_seconds"] for row in rows[1:] if "time/step_seconds" in row)


def compare(trees: dict[str, Path], task: str, rounds: int, folder: Path) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    rows: dict[str, list[dict[str, float]]] = {}
    for turn in range(rounds):
        for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
            rows[name] = figures(trees[name], task, folder / f"{task}-{name}-{turn}")
            seconds[name].append(step_seconds(rows[name]))
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    before, after = losses(rows["before"]), losses(rows["after"])
    return {
        "lines": len(before),
        "first_difference": first_difference(before, after),
        "only_before": sorted({key for row in before for key in row} - {key for row in after for key in row}),
        "only_after": sorted({key for row in after for key in row} - {key for row in before for key in row}),
        "step_seconds_before": statistics.median(seconds["before"]),
        "step_seconds_after": statistics.median(seconds["after"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trees, commits = {}, {}
        for name, revision in (("before", arguments.before), ("after", arguments.after)):
            trees[name] = Path(folder) / name
            subprocess.run(["git", "worktree", "add", "-q", "--detach", trees[name], revision], cwd=ROOT, check=True)
            told = subprocess.run(["git", "rev-parse", "--short", revision], cwd=ROOT, capture_output=True, text=True)
            commits[name] = told.stdout.strip()
        try:
            results = {task: compare(trees, task, arguments.rounds, Path(folder)) for task in arguments.tasks}
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    report = {"machine": platform.processor() or platform.machine(), **commits, "rounds": arguments.rounds, **results}
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
