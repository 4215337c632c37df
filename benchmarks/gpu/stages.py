"""The stages of `benchmarks.gpu.kit`, one a process: `python -m benchmarks.gpu.stages NAME --out FILE`."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

TESTS = ("tests/algorithms", "tests/models/test_ar_sampling.py")
"""Tests of tensor maths, which ask nothing of where tensors lie."""

BOUNDS = {"no": 1e-4, "bf16": 4 * 2**-8, "fp16": 4 * 2**-11}
"""How far a loss may be from the CPU's in fp32, of itself where it is above 1: the rounding of the type a few times
over, and of fp32 sums of thousands of terms in another order. A small cross-entropy is a difference of large logits."""

SMALL_GRPO = ["data.image_size={height: 64, width: 64}"]


@dataclass
class Report:
    """Results, written down as they come."""

    place: Path
    found: dict[str, Any] = field(default_factory=dict)

    def add(self, **results: Any) -> None:
        self.found |= results
        self.place.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def tests(report: Report, device: str, small: bool) -> None:
    """How many tests pass with all tensors on the device, and which do not."""
    asked = ["tests/algorithms/test_advantages.py"] if small else list(TESTS)
    options = "addopts=--import-mode=importlib"  # not the project's own: they need pytest-xdist, and hide the counts
    command = [sys.executable, "-m", "pytest", "-o", options, "-q", "-p", "no:cacheprovider", "--tb=line"]
    done = subprocess.run(
        [*command, "-p", "benchmarks.gpu.on_device", *asked],
        cwd=ROOT,
        env=os.environ | {"GLM_TEST_DEVICE": device},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1] if lines else "")
    }
    red = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report.add(asked=asked, counts=counts, red=red)
    if "passed" not in counts:
        raise RuntimeError(f"no test ran: {(done.stdout + done.stderr)[-1000:]}")


def losses(report: Report, device: str, small: bool) -> None:
    """Losses of supervised steps from the same seeds, against the CPU's in fp32; fp16 with loss scaling."""
    import torch

    from benchmarks.gpu.tiny import BASE, metrics, settings

    torch.backends.cudnn.allow_tf32 = False  # 10 bits of a convolution's inputs are no fp32
    options = [*BASE, "training.use_reward=false", f"training.max_steps={1 if small else 3}"]
    options += ["training.batch_size=2"] if small else []
    wanted = losses_of(metrics("configs/quickstart.yaml", [*options, *settings("cpu", "no")]))
    report.add(cpu_fp32=wanted)
    compared: dict[str, dict[str, Any]] = {}
    for precision, bound in BOUNDS.items():
        if small and precision == "fp16":
            continue
        found = losses_of(metrics("configs/quickstart.yaml", [*options, *settings(device, precision)]))
        gaps = {
            name: abs(value - wanted[name]) / max(1.0, abs(wanted[name]))
            for name, value in found.items()
            if name in wanted
        }
        compared[precision] = {"losses": found, "largest": max(gaps.values()), "bound": bound}
        report.add(compared=compared)
    over = [name for name, part in compared.items() if not part["largest"] <= part["bound"]]
    report.add(over=over)
    if over:
        raise RuntimeError(f"losses in {', '.join(over)} are further from the CPU's than their type rounds")


def losses_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """By step and name, those that are not 0."""
    found = {f"{row['step']:g} {key}": v for row in rows for key, v in row.items() if key.endswith("loss") and v}
    if not found:
        raise RuntimeError(f"no loss was logged: {rows}")
    return found


def decode(report: Report, device: str, small: bool) -> None:
    from benchmarks.gpu.decoding import measure

    measure(report.add, device, small)


def grpo(size: int, *overrides: str) -> Callable[[Report, str, bool], None]:
    """Two GRPO steps of both halves with LoRA at `size` px; the second is measured."""

    def stage(report: Report, device: str, small: bool) -> None:
        from benchmarks.gpu.full import planned, train

        options = [*overrides, f"data.image_size={{height: {size}, width: {size}}}"]
        report.add(options=options)
        report.add(planned_peak=planned(options))  # first: it is there whatever becomes of the run
        report.add(**train(SMALL_GRPO + list(overrides) if small else options, device, small))

    return stage


def nf4(report: Report, device: str, small: bool) -> None:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        report.add(skipped="bitsandbytes is not installed")
        return
    grpo(512, "model.quantization=nf4")(report, device, small)


STAGES: dict[str, Callable[[Report, str, bool], None]] = {
    "tests": tests,
    "losses": losses,
    "decode": decode,
    "grpo_512": grpo(512),
    "grpo_1024": grpo(1024),
    "nf4": nf4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    from benchmarks.gpu.tiny import environment

    report = Report(arguments.out)
    report.add(environment=environment(arguments.device), small=arguments.small)
    STAGES[arguments.stage](report, arguments.device, arguments.small)


if __name__ == "__main__":
    main()
