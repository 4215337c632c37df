"""The whole suite under each instruction set of this processor, with 1 and 2 threads: what is red, how long it took.

    python -m benchmarks.settings [--levels default avx2 avx512] [--threads 1 2] [--out FILE]

torch, oneDNN and MKL each choose kernels by the processor; here all three are held at one level. A level that the
processor lacks is left out, and told. Sums round differently in other kernels: a test that is red on one level alone
has a bound that does not follow from its dtype and scale. Settings that the file of results already has for this
processor and these versions are not run again. Prints a line each; exits with 1 where anything is red.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = {
    "default": ("default", "SSE41", "SSE4_2", "COMPATIBLE"),
    "avx2": ("avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "AVX512"),
}
"""For each level what torch, oneDNN, MKL and MKL's bitwise mode are told."""
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
FLAGS = {"avx2": "avx2", "avx512": "avx512f"}
LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "accelerate", "peft", "numpy")
COUNTED = re.compile(r"(\d+) (failed|passed|skipped|xfailed|errors?)\b")


def processor() -> tuple[str, set[str]]:
    """Its name and its flags, from /proc/cpuinfo where there is one."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    rows = dict(line.split(":", 1) for line in told.split("\n\n")[0].splitlines() if ":" in line)
    named = {key.strip(): value.strip() for key, value in rows.items()}
    return named.get("model name", platform.machine()), set(named.get("flags", "").split())


def suite(level: str, threads: int) -> dict[str, object]:
    """Counts, seconds, and the names of what is red."""
    environment = os.environ | dict(zip(VARIABLES, LEVELS[level], strict=True))
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # two test processes share the cores: who spins keeps the other waiting
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as told:
        command = [sys.executable, "-m", "pytest", "--tb=short", "-p", "no:cacheprovider"]
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT).returncode
        told.seek(0)
        lines = told.read().splitlines()
    counts = {name: int(count) for count, name in COUNTED.findall(lines[-1] if lines else "")}
    red = [line.split(" ", 1)[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if code not in (0, 1):
        red.append(f"pytest ended with {code}: {' '.join(lines[-3:])}")
    return {"level": level, "threads": threads, "seconds": round(time.monotonic() - started), **counts, "red": red}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--levels", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/settings.json")
    arguments = parser.parse_args()
    name, flags = processor()
    machine = {"processor": name, "cores": os.cpu_count(), "python": platform.python_version()}
    machine |= {library: version(library) for library in LIBRARIES}
    runs = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else []
    for level in arguments.levels:
        if level in FLAGS and FLAGS[level] not in flags:
            print(f"{level}: {name} does not have it")
            continue
        for threads in arguments.threads:
            known = [
                run for run in runs if run["machine"] == machine and (run["level"], run["threads"]) == (level, threads)
            ]
            if not known:
                known = [{"machine": machine} | suite(level, threads)]
                runs += known
                arguments.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({key: value for key, value in known[0].items() if key != "machine"}), flush=True)
    return 1 if any(run["red"] for run in runs if run["machine"] == machine) else 0


if __name__ == "__main__":
    sys.exit(main())
