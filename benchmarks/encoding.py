"""What of a supervised step is frozen encoders, and what does it cost with what they give from the cache?

    python -m benchmarks.encoding [--size 128] [--steps 40] [--component both] [--out benchmarks/results/encoding.json]

Two trainers of configs/quickstart.yaml on its 48 target images, one with `cache.enabled: false`, take their steps in
turn in one process, on one thread, so that a machine that is slow for a minute is slow for both. Written down: whether
all losses are the same to the last digit; the median seconds of a step and of the encoding in it; the median of the
ratios without / with cache, step by step, with its 95 % interval (bootstrap); what filling the cache took; how much
of the model's weights then sleeps; and the peak of memory of a step: on a GPU of what is allocated there, on the CPU of
what is resident, each side in a process of its own (on the CPU a sleeping encoder lies where it lay). Prints JSON.

`python benchmarks/two_revisions.py BEFORE AFTER --tasks sft dpo` compares with an older revision.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_resident, reset_peak
from benchmarks.two_revisions import ROOT, interval
from glm_training.config import load_config
from glm_training.trainers.run import build_trainer
from glm_training.trainers.supervised_trainer import SupervisedTrainer
from glm_training.utils.distributed import init_world

OVERRIDES = [
    "training.use_reward=false",
    "training.batch_size=8",
    "training.max_steps=1000",
    "evaluation.enabled=false",
    "logging.log_images=false",
    "logging.use_tensorboard=false",
]


class Timed:
    """A trainer whose steps, and the encoding in them, are timed."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, *, cached: bool) -> None:
        own = [f"output_dir={folder}/{cached}", f"cache.enabled={str(cached).lower()}"]
        own += [f"model.component={arguments.component}"]
        own += [f"data.image_size.{side}={arguments.size}" for side in ("height", "width")]
        config = load_config(ROOT / "configs/quickstart.yaml", [*OVERRIDES, *own])
        trainer = build_trainer(config, init_world(False, None))
        assert isinstance(trainer, SupervisedTrainer)
        self.trainer = trainer
        self.seconds: list[float] = []
        self.encoding: list[float] = []
        self.losses: list[dict[str, float]] = []
        self.peaks: list[int] = []
        terms = trainer.supervision.terms
        encode = terms.encode

        def timed(*given: Any) -> Any:
            started = self._now()
            found = encode(*given)
            self.encoding[-1] += self._now() - started
            return found

        terms.encode = timed  # type: ignore[method-assign]
        started = self._now()
        trainer.prepare()
        self.filled = self._now() - started

    def step(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.encoding.append(0.0)
        started = self._now()
        figures = self.trainer.training_step()
        self.seconds.append(self._now() - started)
        self.losses.append({name: value for name, value in figures.items() if name.endswith("loss")})
        self.peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        self.trainer.step += 1

    def figures(self) -> dict[str, Any]:
        """Medians of the steps after the first."""
        found = {
            "seconds": statistics.median(self.seconds[1:]),
            "seconds_encoding": statistics.median(self.encoding[1:]),
        }
        return found | ({"peak_mib": max(self.peaks[1:]) / 2**20} if torch.cuda.is_available() else {})

    def asleep(self) -> dict[str, float]:
        """MiB of weights, and of those that no step uses."""
        family, encoding = self.trainer.family, self.trainer.encoding
        modules = [family.component(name) for name in family.components]
        sleepers = encoding.encoder.sleepers(pictures=encoding.keeps_pictures)
        return {"weights_mib": _mib(modules), "asleep_mib": _mib(sleepers)}

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def _mib(modules: list[torch.nn.Module]) -> float:
    unique = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in unique.values()) / 2**20


def resident(arguments: argparse.Namespace, name: str) -> float:
    """Peak MiB of two steps of one side, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.encoding", "--side", name, "--component", arguments.component]
    command += ["--size", str(arguments.size)]
    return float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_resident(folder: Path, arguments: argparse.Namespace) -> None:
    """What `resident` reads."""
    run = Timed(folder, arguments, cached=arguments.side == "cached")
    reset_peak()
    for _ in range(2):
        run.step()
    sys.stdout.write(f"\n{peak_resident() / 2**20:.0f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--component", choices=("ar", "dit", "both"), default="both")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=("uncached", "cached"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.side:
            return print_resident(Path(folder), arguments)
        runs = {name: Timed(Path(folder), arguments, cached=name == "cached") for name in ("uncached", "cached")}
        for turn in range(arguments.steps + 1):
            for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
                runs[name].step()
        uncached, cached = runs["uncached"], runs["cached"]
        ratios = [slow / fast for slow, fast in zip(uncached.seconds[1:], cached.seconds[1:], strict=True)]
        report = {
            "machine": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "size": arguments.size,
            "component": arguments.component,
            "steps": arguments.steps,
            "same_losses": uncached.losses == cached.losses,
            **{name: run.figures() for name, run in runs.items()},
            "ratio": statistics.median(ratios),
            "ratio_95": interval(ratios),
            "seconds_to_fill": cached.filled,
            **cached.asleep(),
        }
    if not torch.cuda.is_available():
        report["resident_mib"] = {name: resident(arguments, name) for name in ("uncached", "cached")}
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
