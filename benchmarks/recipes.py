"""Does each recipe of configs/recipes raise its training reward? Two seeds, against shuffled advantages.

    python -m benchmarks.recipes --out benchmarks/results/recipes.json

Every recipe trains its half of the tiny model on four prompts (benchmarks/recipes/tiny_ar.yaml, tiny_dit.yaml): as it
is, with `reward.grpo.shuffle_advantages`, and frozen (a learning rate of 1e-12), one thread a run. The arms of a recipe
draw with the same random numbers and what they draw differs from step to step, so what a run has gained is its reward
minus the frozen model's at the same steps. Recipes that draw alike share the frozen run. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.quickstart import machine

ROOT = Path(__file__).parents[1]
AR = ("grpo", "gspo", "cispo", "dr_grpo", "dapo", "stage")
DIT = (
    "flow_grpo",
    "dance",
    "cps_window",
    "mixgrpo",
    "flow_grpo_fast",
    "grpo_guard",
    "flow_dppo",
    "nft",
    "awm",
    "dgpo",
)
ELSEWHERE = ("opd",)
"""Recipes that learn from no reward: opd is measured by `benchmarks.merging`."""
ARMS = ("trained", "shuffled", "frozen")
DRAWS_LIKE = {name: "grpo" for name in AR} | {
    "grpo_guard": "flow_grpo",
    "flow_dppo": "flow_grpo",
    "awm": "nft",
    "dgpo": "nft",
}
"""Recipes whose frozen model draws exactly what that of another one does."""
LAST = 4
"""Steps at the end over which rewards are averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*AR, *DIT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    runs = [(drawer(recipe, arm), seed, arm) for recipe in args.recipes for seed in args.seeds for arm in ARMS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: train(args.runs, *run, args.overrides), dict.fromkeys(runs)))
    report = {
        "machine": f"{machine()}, one thread a run, {args.jobs} runs side by side",
        "seeds": args.seeds,
        "recipes": {recipe: summary(args.runs, recipe, args.seeds) for recipe in args.recipes},
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n" + table(report["recipes"]) + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def drawer(recipe: str, arm: str) -> str:
    """The recipe whose run stands for `recipe` in an arm."""
    return DRAWS_LIKE.get(recipe, recipe) if arm == "frozen" else recipe


def folder_of(runs: Path, recipe: str, seed: int, arm: str) -> Path:
    return ROOT / runs / f"{recipe}-{seed}-{arm}"


def train(runs: Path, recipe: str, seed: int, arm: str, overrides: list[str]) -> None:
    """One run in a process of its own, unless its folder holds all of its steps."""
    folder = folder_of(runs, recipe, seed, arm)
    if (folder / "done").is_file():
        return
    half = "ar" if recipe in AR else "dit"
    command = [sys.executable, "train.py", "--config", f"benchmarks/recipes/tiny_{half}.yaml"]
    command += ["--config", f"configs/recipes/{recipe}.yaml", f"seed={seed}", f"output_dir={folder}"]
    command += {"shuffled": ["reward.grpo.shuffle_advantages=true"], "frozen": ["training.learning_rate=1e-12"]}.get(
        arm, []
    )
    if half == "dit":
        command += ["reward.grpo.dit.kl_coef=0"]  # the recipes' own, near 0 in so few steps, would cost a pass
    command += overrides
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    (folder / "done").touch()


def rows_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "reward/total" in (row := json.loads(line))]


def summary(runs: Path, recipe: str, seeds: list[int]) -> dict[str, Any]:
    """Gain over the frozen model per seed, trained and shuffled, and per minute; seconds per step; all rewards."""
    arms = {arm: [rows_of(folder_of(runs, drawer(recipe, arm), seed, arm)) for seed in seeds] for arm in ARMS}
    rewards = {arm: [[row["reward/total"] for row in rows] for rows in arms[arm]] for arm in ARMS}
    frozen = rewards["frozen"]
    gains = {arm: [end(row) - end(still) for row, still in zip(rewards[arm], frozen, strict=True)] for arm in ARMS[:2]}
    seconds = statistics.median(row["time/step_seconds"] for rows in arms["trained"] for row in rows[1:])
    steps = len(frozen[0])
    return {
        "half": "ar" if recipe in AR else "dit",
        "steps": steps,
        "seconds_per_step": round(seconds, 2),
        "frozen": round(statistics.fmean(end(row) for row in frozen), 4),
        "gain": [round(gain, 4) for gain in gains["trained"]],
        "gain_shuffled": [round(gain, 4) for gain in gains["shuffled"]],
        "gain_per_minute": round(statistics.fmean(gains["trained"]) / (steps * seconds / 60), 4),
        "rewards": {arm: [[round(value, 4) for value in row] for row in rewards[arm]] for arm in ARMS},
    }


def end(rewards: list[float]) -> float:
    """Mean of the last steps."""
    return statistics.fmean(rewards[-LAST:])


def table(recipes: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown, for docs/recipes.md."""
    heads = ("recipe", "steps", "s / step", "frozen", "gain per seed", "shuffled, per seed", "gain per minute")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in recipes.items():
        gains, shuffled = (", ".join(f"{gain:+.3f}" for gain in row[key]) for key in ("gain", "gain_shuffled"))
        lines.append(
            f"| `{name}` | {row['steps']} | {row['seconds_per_step']:.1f} | {row['frozen']:.3f} | {gains} | "
            f"{shuffled} | {row['gain_per_minute']:+.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
