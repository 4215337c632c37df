"""Do a configuration's monitors stay silent for its own reward, and trip for one that degenerate pictures win?

    python -m benchmarks.hacking --out benchmarks/results/hacking.json

Runs `train.py` with the configuration as it is, and with each reward of examples/hackable_rewards.py in the place of
its own, for its own number of steps. For each run: what tripped, when and in which words, and the largest share of its
limit that each figure of a training step has used; that of the honest runs says how far figures move by themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.quickstart import machine
from glm_training.config import load_config
from glm_training.reinforcement.monitors.monitors import Monitors
from glm_training.utils.distributed import World

ROOT = Path(__file__).parents[1]
PLANTED = ("Brightness", "Sharpness")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rewards", nargs="+", default=["own", *PLANTED])
    parser.add_argument("--runs", type=Path, default=Path("runs/hacking"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    report: dict[str, Any] = {"config": args.config, "machine": machine(), "overrides": args.overrides, "runs": {}}
    for reward in args.rewards:
        for seed in args.seeds:
            folder = ROOT / args.runs / f"{reward}-{seed}"
            overrides = [f"seed={seed}", f"output_dir={folder}", "logging.log_interval=1", *args.overrides]
            if reward != "own":
                planted = f"reward.calculator=examples/hackable_rewards.py:{reward}"
                overrides += ["reward.metrics=null", "reward.dit.weights=null", planted]
            command = [sys.executable, "train.py", "--config", args.config, *overrides]
            subprocess.run(command, cwd=ROOT, check=True)
            report["runs"][f"{reward}-{seed}"] = outcome(folder)
            text = json.dumps(report, indent=1)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(text + "\n")
    sys.stdout.write(text + "\n")


def outcome(folder: Path) -> dict[str, Any]:
    """What the monitors of the run in `folder` said, and how much of its limit each figure used at most."""
    log = (folder / "train.log").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "reward/total" in line]
    scores = [line["eval/total"] for line in lines if "eval/total" in line]
    return {
        "steps": len(steps),
        "warnings": [line.partition("warning: ")[2] for line in log if "warning: monitor " in line],
        "share_of_limit_used": most_used(folder / "config.yaml", steps),
        "training_reward": [round(steps[0]["reward/total"], 4), round(steps[-1]["reward/total"], 4)],
        "held_out_reward": [round(scores[0], 4), round(scores[-1], 4)] if scores else None,
    }


def most_used(config: Path, steps: list[dict[str, float]]) -> dict[str, float]:
    """By figure of training steps: the largest share of its limit that it used, the limits being those of `config`."""
    monitors, most = Monitors(load_config(config), World()), dict[str, float]()
    for line in steps:
        monitors.after_step(int(line["step"]), line)
        for name, series in monitors.series.items():
            limit = monitors.limits[name]
            if limit.absolute or line["step"] > monitors.window:
                used = limit.used(series.start, series.now) / limit.limit
                most[name] = max(most.get(name, 0.0), round(used, 3))
    return most


if __name__ == "__main__":
    main()
