"""What a newcomer waits for: when a quickstart tells its first reward, its first step, and how long it takes.

    python -m benchmarks.first_minutes --out benchmarks/results/first_minutes.json

Runs the configurations as they are, one after the other, with all the cores there are and nothing beside them (let
nothing else run), and notes in which second after the command each of these lines comes. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.quickstart import ROOT, machine

CONFIGS = ("configs/quickstart.yaml", "configs/quickstart_i2i.yaml")
LINES = {"first_reward": "reward 0.", "first_step": "step 1/"}
"""What is noted, and what is in the first line that tells it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, object] = {"machine": machine()}
    for config in args.configs:
        with tempfile.TemporaryDirectory() as folder:
            report[config] = seconds(config, Path(folder) / "run")
        sys.stderr.write(f"{config}: {report[config]}\n")
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def seconds(config: str, folder: Path) -> dict[str, float]:
    """In which second after the command each of `LINES` came, and the command ended, as `whole`."""
    command = [sys.executable, "train.py", "--config", config, f"output_dir={folder}"]
    found: dict[str, float] = {}
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            told = [name for name, words in LINES.items() if name not in found and words in line]
            found |= dict.fromkeys(told, round(time.perf_counter() - started, 1))
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}")
    return found | {"whole": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    main()
