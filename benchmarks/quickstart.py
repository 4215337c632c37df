"""Does the quickstart learn? Held-out reward before and after over several seeds, against shuffled advantages.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Runs `train.py` with each seed twice: as it is, and with `reward.grpo.shuffle_advantages`. The standard error of a
change is over held-out prompts, each prompt's change being the mean over seeds.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arms", nargs="+", default=["trained", "shuffled"])
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    report: dict[str, object] = {"config": args.config, "machine": machine(), "seeds": args.seeds}
    for arm in args.arms:
        folders, seconds = [], []
        for seed in args.seeds:
            folder = args.runs / f"{arm}-{seed}"
            overrides = [f"seed={seed}", f"output_dir={folder}", *args.overrides]
            if arm == "shuffled":
                overrides.append("reward.grpo.shuffle_advantages=true")
            started = time.time()
            subprocess.run([sys.executable, "train.py", "--config", args.config, *overrides], cwd=ROOT, check=True)
            folders.append(ROOT / folder)
            seconds.append(round(time.time() - started, 1))
        report[arm] = summary(folders) | {"seconds_per_run": seconds}
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


def summary(folders: list[Path]) -> dict[str, object]:
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
