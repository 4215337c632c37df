"""Which method when? Recipes on tasks of the tiny world, cell by cell: a task, a recipe, a learning rate, a seed.

    python -m benchmarks.methods [--tasks words objects] [--recipes nft awm] [--minutes 60] [--jobs 2]
    python -m benchmarks.methods --table

A cell is one run of `train.py`, one thread, some six minutes, and one file of benchmarks/results/methods; cells that
are there are not run again, so it can be stopped at any time and goes on where it was. First every recipe is tried with
each of the task's rates (seed 0); then the rate whose held-out gain was largest with five further seeds, some recipes
with shuffled advantages as well. All draw the same number of pictures a step: they are equal in calls of the reward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.methods.table import best_rate, page, table
from benchmarks.quickstart import machine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/methods"
PAGE = ROOT / "docs/which_method.md"
TASKS = {
    "objects": ("grpo", "gspo", "cispo", "dr_grpo", "dapo", "stage"),
    "words": (
        *("flow_grpo", "dance", "cps_window", "mixgrpo", "flow_grpo_fast", "grpo_guard", "flow_dppo"),
        *("nft", "awm", "dgpo"),
    ),
    "credit": ("tree", "flat", "separate", "plans"),
}
"""Recipes by task, benchmarks/methods/<task>.yaml; of configs/recipes, or of benchmarks/methods where it has one."""
RATES = {"objects": (5e-5, 1e-4, 2e-4), "words": (3e-5, 1e-4, 3e-4), "credit": (2e-4,)}
OVER_RECIPES = {"objects": ("reward.grpo.ar.updates_per_rollout=6",)}
"""What a task says after the recipe: with the recipes' two updates the clip met one ratio of a thousand."""
CONTROLLED = ("grpo", "nft", "awm", "flow_grpo_fast")
"""Recipes that are also run with shuffled advantages: one of every kind of loss."""
SEEDS = (1, 2, 3, 4, 5)
TUNED_ON = 0
DRIFT = "monitor/picture_change"


@dataclass(frozen=True)
class Cell:
    """One run; `shuffled`: its advantages go to the wrong samples."""

    task: str
    recipe: str
    rate: float
    seed: int
    shuffled: bool = False

    @property
    def path(self) -> Path:
        name = f"{self.task}-{self.recipe}-{self.rate:g}-{self.seed}{'-shuffled' if self.shuffled else ''}"
        return RESULTS / f"{name}.json"

    def read(self) -> dict[str, Any] | None:
        return json.loads(self.path.read_text()) if self.path.is_file() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--recipes", nargs="+", help="of those tasks; all without it")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no cell is started after so long")
    parser.add_argument("--jobs", type=int, default=2, help="cells side by side")
    parser.add_argument("--table", action="store_true", help="run nothing, and write the page anew")
    args = parser.parse_args()
    if not args.table:
        run(args)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), cells()), encoding="utf-8")
    sys.stdout.write(table(cells()))


def cells() -> list[dict[str, Any]]:
    """All that have been run."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]


def run(args: argparse.Namespace) -> None:
    """Runs what is missing, `args.jobs` at once, until the time is up."""
    ends = time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.jobs) as pool:
        data = {task: write_data(Path(folder) / task, task) for task in args.tasks}
        while missing := list(due(args.tasks, args.recipes))[: args.jobs]:
            if time.time() > ends:
                return
            runs = [pool.submit(train, cell, data[cell.task], Path(folder) / "runs") for cell in missing]
            for cell_run in runs:
                cell_run.result()


def due(tasks: list[str], only: list[str] | None) -> Iterator[Cell]:
    """Cells that are to be run now: those of the search first, then those at the rates that it found."""
    recipes = [(task, recipe) for task in tasks for recipe in TASKS[task] if only is None or recipe in only]
    searched = [(task, recipe) for task, recipe in recipes if len(RATES[task]) > 1]
    search = [Cell(task, recipe, rate, TUNED_ON) for task, recipe in searched for rate in RATES[task]]
    yield from (cell for cell in search if cell.read() is None)
    rates = [(task, recipe, found_rate(task, recipe)) for task, recipe in recipes]
    for seed in SEEDS:
        for shuffled in (False, True):
            for task, recipe, rate in rates:
                if rate is None or (shuffled and recipe not in CONTROLLED):
                    continue
                cell = Cell(task, recipe, rate, seed, shuffled)
                if cell.read() is None:
                    yield cell


def found_rate(task: str, recipe: str) -> float | None:
    """The rate that the search found, or the only one; None until all of the search is there."""
    if len(RATES[task]) == 1:
        return RATES[task][0]
    cells = [Cell(task, recipe, rate, TUNED_ON).read() for rate in RATES[task]]
    found = [cell for cell in cells if cell is not None]
    return best_rate(found) if len(found) == len(cells) else None


def train(cell: Cell, data: list[str], runs: Path) -> None:
    """Runs a cell in a process of its own and keeps what it measured. Minutes are of the processor, so that a busy
    machine does not change them."""
    folder = runs / cell.path.stem
    command = [sys.executable, "train.py", "--config", f"benchmarks/methods/{cell.task}.yaml"]
    own = Path(f"benchmarks/methods/{cell.recipe}.yaml")
    recipe = own if (ROOT / own).is_file() else f"configs/recipes/{cell.recipe}.yaml"
    command += ["--config", str(recipe), f"output_dir={folder}", f"seed={cell.seed}"]
    command += [f"training.learning_rate={cell.rate:g}", *OVER_RECIPES.get(cell.task, ()), *data]
    command += ["reward.grpo.shuffle_advantages=true"] if cell.shuffled else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime) / 60
    RESULTS.mkdir(parents=True, exist_ok=True)
    cell.path.write_text(json.dumps(measured(cell, folder, minutes), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


def measured(cell: Cell, folder: Path, minutes: float) -> dict[str, Any]:
    """What a run's files tell: held-out scores per prompt before and after, and the course of its steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "reward/total" in row]
    before, *_, after = [json.loads(line)["scores"] for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    half = "dit" if cell.task == "words" else "ar"
    names = ("reward/total", "reward/exactly_right", "reward/plan_variance_share", "monitor/diversity")
    kept = {name: name for name in names}
    kept |= {name: f"{half}/{name}" for name in ("kl", "clip_fraction", "grad_norm")}
    pictures = 72 * (len(steps) + sum(row.get("reward/resampled_groups", 0) for row in steps) / 6)
    return {
        "task": cell.task,
        "recipe": cell.recipe,
        "rate": cell.rate,
        "seed": cell.seed,
        "shuffled": cell.shuffled,
        "machine": machine(),
        "minutes": round(minutes, 2),
        "held_out": {"before": mean(before["total"]), "after": mean(after["total"])},
        "scores": {name: [before[name], after[name]] for name in ("total", "exactly_right")},
        "reward_calls": round(pictures),
        "picture_change": next(row[DRIFT] for row in reversed(rows) if DRIFT in row),
        "steps": {name: [row.get(tag) for row in steps] for name, tag in kept.items()},
    }


def mean(values: list[float | None]) -> float:
    there = [value for value in values if value is not None]
    return sum(there) / len(there)


def write_data(folder: Path, task: str) -> list[str]:
    """The prompts of data/t2i that a task is about, with their targets, in `folder`; as overrides."""
    wanted = {"words": (True,), "objects": (False,), "credit": (True, False)}[task]
    for part in ("", "held_out"):
        source, target = ROOT / "data/t2i" / part, folder / part
        prompts = list(enumerate((source / "prompts.txt").read_text().splitlines()))
        chosen = [(row, prompt) for row, prompt in prompts if ('"' in prompt) in wanted]
        (target / "target_images").mkdir(parents=True)
        for place, (row, _) in enumerate(chosen):
            shutil.copy(source / f"target_images/{row}.png", target / f"target_images/{place}.png")
        (target / "prompts.txt").write_text("".join(f"{prompt}\n" for _, prompt in chosen), encoding="utf-8")
    return [
        f"data.prompts_file={folder}/prompts.txt",
        f"data.target_images_dir={folder}/target_images",
        f"evaluation.eval_prompts_file={folder}/held_out/prompts.txt",
        f"evaluation.eval_target_images_dir={folder}/held_out/target_images",
    ]


if __name__ == "__main__":
    main()
