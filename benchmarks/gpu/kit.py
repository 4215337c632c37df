"""All that is to be known of this package on a GPU, in nine minutes, without a network.

    python -m benchmarks.gpu.kit --out FOLDER                            # on a machine with a GPU
    python -m benchmarks.gpu.kit --out FOLDER --only nf4                 # where bitsandbytes is installed too
    python -m benchmarks.gpu.kit --out FOLDER --device cpu --small       # the same script, to see that it runs

Each stage is a process of its own with a time limit of its own: one that hangs or fails takes no other with it. A
result lies in FOLDER/<stage>.json as soon as it is there, FOLDER/summary.json says how each stage ended. Exits with 1
where one did not finish.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

STAGES = {"tests": 70, "losses": 110, "decode": 150, "grpo_512": 80, "grpo_1024": 100, "nf4": 60}
"""In this order, each with the seconds after which it is ended."""

LEAST = 15
"""Seconds: a stage that would have fewer left is not started."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps in every stage")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, with commas: {', '.join(STAGES)}")
    parser.add_argument("--patience", type=float, default=1.0, help="times the limit of each stage, for slow machines")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        parser.error(f"no stages {', '.join(unknown)}; there are {', '.join(STAGES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    options = ["--device", arguments.device, *(["--small"] if arguments.small else [])]
    started, told = time.monotonic(), dict[str, Any]()
    for name in STAGES:
        if name not in wanted:
            continue
        left = arguments.minutes * 60 - (time.monotonic() - started)
        limit = min(STAGES[name] * arguments.patience, left)
        place = arguments.out / f"{name}.json"
        place.unlink(missing_ok=True)  # of an earlier run
        told[name] = run_stage(name, place, options, limit) if limit >= LEAST else {"ended": "no time was left"}
        print(f"{name}: {told[name]['ended']}", flush=True)
        (arguments.out / "summary.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    for name, end in told.items():
        print(f"{name:<12}{end['ended']:<24}{end.get('seconds', ''):>8}  {end.get('error', '')}")
    return int(any(end["ended"] != "finished" for end in told.values()))


def run_stage(name: str, place: Path, options: list[str], limit: float) -> dict[str, Any]:
    """How a stage ended, with the end of what a failed one wrote. What it found lies in `place`."""
    command = [sys.executable, "-m", "benchmarks.gpu.stages", name, "--out", str(place), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log = place.with_suffix(".log")
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session: what it started ends with it
                process.wait()
    seconds = round(time.monotonic() - started, 1)
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    log.unlink()
    if code == 0:
        return {"ended": "finished", "seconds": seconds}
    ended = f"over its {limit:.0f} s" if code is None else f"failed ({code})"
    return {"ended": ended, "seconds": seconds, "error": text.split("\n")[-1][:300], "output": text[-3000:]}


if __name__ == "__main__":
    sys.exit(main())
