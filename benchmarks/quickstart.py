"""Does the quickstart learn? Held-out reward before and after over several seeds, against shuffled advantages.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Runs `train.py` with each seed as it is and with `reward.grpo.shuffle_advantages`, or one half alone (`--arms`). The
standard error of a change is over held-out prompts, each prompt's change being the mean over seeds. Finished runs are
kept, so that it can be stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARMS = {
    "trained": [],
    "shuffled": ["reward.grpo.shuffle_advantages=true"],
    "ar": ["model.component=ar"],
    "dit": ["model.component=dit"],
}
"""What an arm changes of the config; one half alone draws as many images as both together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=["trained", "shuffled"])
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    report: dict[str, object] = {"config": args.config, "machine": machine(), "seeds": args.seeds, "jobs": args.jobs}
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {arm: [pool.submit(train, args, arm, seed) for seed in args.seeds] for arm in args.arms}
    for arm, runs in started.items():
        folders, seconds = zip(*(run.result() for run in runs), strict=True)
        report[arm] = summary(folders) | {"seconds_per_run": seconds}
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def train(args: argparse.Namespace, arm: str, seed: int) -> tuple[Path, float]:
    """The folder of a run, and how many seconds it took. One that was finished is not run again."""
    folder = args.runs / f"{arm}-{seed}"
    finished = ROOT / folder / "seconds.json"
    if finished.is_file():
        return ROOT / folder, json.loads(finished.read_text())
    overrides = [f"seed={seed}", f"output_dir={folder}", *ARMS[arm], *args.overrides]
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    started = time.time()
    command = [sys.executable, "train.py", "--config", args.config, *overrides]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    finished.write_text(json.dumps(round(time.time() - started, 1)))
    return ROOT / folder, json.loads(finished.read_text())


def summary(folders: Sequence[Path]) -> dict[str, object]:
    """Before, after and change of each metric over the runs in `folders`."""
    runs = [[json.loads(line) for line in (f / "evaluations.jsonl").read_text().splitlines()] for f in folders]
    result: dict[str, object] = {}
    for name in runs[0][0]["scores"]:
        befores = [run[0]["scores"][name] for run in runs]
        afters = [run[-1]["scores"][name] for run in runs]
        prompts = [i for i, value in enumerate(befores[0]) if value is not None]
        changes = [statistics.fmean(a[i] - b[i] for b, a in zip(befores, afters, strict=True)) for i in prompts]
        error = statistics.stdev(changes) / len(changes) ** 0.5
        per_seed = [statistics.fmean(a[i] - b[i] for i in prompts) for b, a in zip(befores, afters, strict=True)]
        result[name] = {
            "before": round(statistics.fmean(b[i] for b in befores for i in prompts), 4),
            "after": round(statistics.fmean(a[i] for a in afters for i in prompts), 4),
            "change": round(statistics.fmean(changes), 4),
            "standard_error": round(error, 4),
            "standard_errors": round(statistics.fmean(changes) / error, 2) if error else None,
            "change_per_seed": [round(value, 4) for value in per_seed],
        }
    return result


def machine() -> str:
    """Processor model, as the system names it, and the cores this process may use."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


if __name__ == "__main__":
    main()
