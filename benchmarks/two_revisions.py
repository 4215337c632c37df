"""Two revisions of this repository train the same things: are their losses identical, and which is faster?

    python benchmarks/two_revisions.py BEFORE AFTER [--tasks sft grpo] [--out benchmarks/results/two_revisions.json]

Each revision is checked out beside the other, and both train at once, in lockstep: a step of one, then the same step of
the other, each while the other waits, on one thread and the tiny models. Written down per task: whether every logged
figure but times is the same to the last digit; the median seconds of a step after the first, with what follows it; and
the median of their ratios after / before, step by step, with its 95 % interval (bootstrap) and its quartiles. A machine
that is slow for a minute is slow for both. The same, named processor_..., of the seconds that the process computed, in
which others that want the processor count less. Prints JSON. A change that only moves code must give identical losses
and a ratio of 1 within that interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMON = [
    "evaluation.enabled=false",
    "logging.log_images=false",
    "logging.use_tensorboard=false",
    "logging.save_interval=100000",
    "logging.log_interval=1",
]
PLAIN = ["training.use_reward=false", "training.batch_size=8", "training.max_steps=81", "model.name=tiny"]
AR_ALONE = [
    "model.component=ar",
    "model.dit.num_inference_steps=2",
    "training.batch_size=8",
    "rollout.plans_per_prompt=16",
    "rollout.renders_per_plan=1",
]
"""128 plans a step, each drawn once and in haste."""
AS_PAID = ["reward.grpo.ar.kl_coef=0.6"]
"""What the file has said in other ways, so that both revisions train the same thing."""
TASKS: dict[str, tuple[str, list[str]]] = {
    "sft": ("configs/quickstart.yaml", [*PLAIN, *COMMON]),
    "grpo": ("configs/quickstart.yaml", [*AS_PAID, "training.max_steps=61", "training.batch_size=1", *COMMON]),
    "quickstart": ("configs/quickstart.yaml", ["training.max_steps=21", *COMMON]),
    "plans": ("configs/quickstart.yaml", [*AR_ALONE, "training.max_steps=21", *COMMON]),
    "dpo": ("configs/sdxl_dpo_lora_tiny.yaml", ["training.max_steps=151", *COMMON]),
    "dmdr": ("configs/sdxl_dmdr_cold_start_tiny.yaml", ["training.max_steps=101", *COMMON]),
}
TIMES = ("time/", "images_per_second", "tokens_per_second", "memory/")


DRIVER = """
import os, runpy, sys, time
from glm_training.trainers.base_trainer import BaseTrainer
go, told = os.fdopen(int(sys.argv.pop(1))), os.fdopen(int(sys.argv.pop(1)), "w", buffering=1)
advance = BaseTrainer._advance
def timed(self, *arguments):
    if not go.readline():
        sys.exit("nobody asks for steps any more")
    started = time.perf_counter(), time.process_time()
    advance(self, *arguments)
    print(time.perf_counter() - started[0], time.process_time() - started[1], file=told)
BaseTrainer._advance = timed
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


class Run:
    """A run of `task` by the code in `tree` that takes a step when it is told to."""

    def __init__(self, tree: Path, task: str, folder: Path) -> None:
        config, overrides = TASKS[task]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        (go, own_go), (own_told, told) = os.pipe(), os.pipe()
        command = [sys.executable, "-c", DRIVER, str(go), str(told), "--config", config, *overrides]
        self.folder, self.errors = folder, folder.with_suffix(".stderr").open("w+")
        self.process = subprocess.Popen(
            [*command, f"output_dir={folder}"],
            cwd=tree,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            pass_fds=(go, told),
        )
        os.close(go)
        os.close(told)
        self._go, self._told = os.fdopen(own_go, "w", buffering=1), os.fdopen(own_told)

    def step(self) -> tuple[float, float] | None:
        """Seconds of the next step, and of them those of the processor; None once the run is over."""
        with suppress(BrokenPipeError):
            self._go.write("go\n")
        told = self._told.readline().split()
        return (float(told[0]), float(told[1])) if told else None

    def rows(self) -> list[dict[str, float]]:
        """The logged lines, once it has ended."""
        if self.process.wait() != 0:
            self.errors.seek(0)
            raise SystemExit(f"{self.folder.name} failed:\n{self.errors.read()}")
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
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


def compare(trees: dict[str, Path], task: str, folder: Path) -> dict[str, object]:
    runs = {name: Run(tree, task, folder / f"{task}-{name}") for name, tree in trees.items()}
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
    running, turn = True, 0
    while running:
        for name in list(trees)[:: 1 if turn % 2 == 0 else -1]:
            step = runs[name].step()
            running = running and step is not None
            steps[name] += [] if step is None else [step]
        turn += 1
    before, after = (losses(runs[name].rows()) for name in ("before", "after"))
    wall, processor = ([[step[i] for step in steps[name][1:]] for name in ("before", "after")] for i in (0, 1))
    return {
        "steps": len(wall[0]),
        "first_difference": first_difference(before, after),
        "only_before": sorted({key for row in before for key in row} - {key for row in after for key in row}),
        "only_after": sorted({key for row in after for key in row} - {key for row in before for key in row}),
        **compared(*wall),
        **{f"processor_{key}": value for key, value in compared(*processor).items()},
    }


def compared(before: list[float], after: list[float]) -> dict[str, object]:
    """Medians of two lists of seconds, and of their ratios."""
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    return {
        "seconds_before": statistics.median(before),
        "seconds_after": statistics.median(after),
        "ratio": statistics.median(ratios),
        "ratio_95": interval(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """In which the median lies with 95 % confidence, by resampling."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return [medians[draws // 40], medians[-draws // 40 - 1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
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
            results = {task: compare(trees, task, Path(folder)) for task in arguments.tasks}
        finally:
            for tree in trees.values():
                subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
    report = {"machine": platform.processor() or platform.machine(), **commits, **results}
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
