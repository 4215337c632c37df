"""A GRPO step of GLM-Image's published widths on the CPU: do the real shapes, token counts and dtypes pass through
every line, how long does each phase take, and is its peak of memory the one that `glm-train plan` works out?

    python -m benchmarks.full_width --save                       # ar, dit and both, into results/full_width.json
    python -m benchmarks.full_width --component ar --size 256    # prints alone
    python -m benchmarks.full_width --replan                     # works out the plans of what was measured anew

`model.name: full-width` has 2 layers of each network and random weights. Each run is a process of its own: a prompt,
two images, two denoising steps, LoRA. Of each phase: seconds of the clock and of the processor (other programs may
share the machine), the most resident memory, and the most bytes of tensors that were alive, which is what a plan
counts. Those of tensors are the sums of all storages, so a scorer's in its thread are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import peak_resident, reset_peak
from benchmarks.settings import processor
from glm_training.models.glm_image import full_width, loading
from glm_training.models.glm_image.full_width import full_width_configuration

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/t2i_training.yaml"
RESULTS = ROOT / "benchmarks/results/full_width.json"
GIB = 1 << 30
GROUPS = {"ar": (2, 1), "dit": (1, 2), "both": (2, 1)}
"""Plans of a prompt, and renders of each: the smallest groups that compare something."""

PHASES = {
    "rollout: ar": "rollout: plans",
    "rollout: dit vae": "rollout: renders",
    "rollout: vae": "rollout: decoding",
    "update: ar": "AR: forward and backward",
    "update: dit": "DiT: forward and backward",
}
"""What a measured phase is called in a plan."""


KEY = ("component", "size", "precision", "narrow_vae")
"""What tells runs apart in the file of results."""


def overrides(component: str, size: int, precision: str) -> list[str]:
    """Of the configuration. The DiT half's own run is guided, which doubles its passes; the others are not."""
    plans, renders = GROUPS[component]
    low = precision == "bf16"
    return [
        "model.name=full-width",
        f"model.component={component}",
        f"model.torch_dtype={'bfloat16' if low else 'float32'}",
        f"training.mixed_precision={'bf16' if low else 'no'}",
        f"data.image_size={{height: {size}, width: {size}}}",
        "data.num_workers=0",
        "data.pin_memory=false",
        "training.max_steps=1",
        "training.warmup_steps=0",
        "training.gradient_accumulation_steps=1",
        "rollout.num_inference_steps=2",
        "rollout.sde_window_size=1",
        f"model.dit.guidance_scale={1.5 if component == 'dit' else 1.0}",
        f"rollout.plans_per_prompt={plans}",
        f"rollout.renders_per_plan={renders}",
        f"reward.grpo.num_samples={plans * renders}",
        "reward.metrics={structure: 1.0}",
        "reward.grpo.dit.compared_with=prompt",  # of two plans with one render each
        "evaluation.enabled=false",
        "logging.log_images=false",
        "logging.use_tensorboard=false",
        "logging.log_interval=1",
    ]


class Meter:
    """Where the phases of a step begin, and what each took."""

    def __init__(self, alive: Any) -> None:
        self.alive = alive
        self.stage, self.name = "rollout", "loading"
        self.found: dict[str, dict[str, float]] = {}
        self._begin()

    def _begin(self) -> None:
        reset_peak()
        self.alive.reset()
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def mark(self, name: str) -> None:
        """Ends the phase so far; `name` is what follows."""
        seconds = time.perf_counter() - self.clock, time.process_time() - self.processor
        told = self.found.setdefault(self.name, dict.fromkeys(("seconds", "cpu", "resident", "tensors"), 0.0))
        told["seconds"] += seconds[0]
        told["cpu"] += seconds[1]
        told["resident"] = max(told["resident"], peak_resident() / GIB)
        told["tensors"] = max(told["tensors"], self.alive.peak / GIB)
        self.name = name
        self._begin()

    def watch(self) -> None:
        """Follows the phases of a reward step, which says at each what it uses (`Residency.only`)."""
        from glm_training.engine.clock import Clock
        from glm_training.engine.residency import Residency

        lap, only = Clock.lap, Residency.only

        def lapped(clock: Clock, name: str) -> None:
            self.stage = {"rollout": "reward", "reward": "gate"}.get(name, self.stage)
            self.mark(self.stage if name == "rollout" else "between")
            lap(clock, name)

        def placed(residency: Residency, *names: str) -> None:
            halves = [name for name in names if not name.endswith("optimizer")]
            self.stage = "update" if len(halves) < len(names) else self.stage
            self.mark(f"{self.stage}: {' '.join(halves)}")
            only(residency, *names)

        Clock.lap, Residency.only = lapped, placed  # type: ignore[method-assign]


def with_narrow_vae(part: str) -> dict[str, Any]:
    """The configuration of `full-width` with a VAE of a quarter of the channels."""
    settings = full_width_configuration(part)
    if part == "vae":
        settings["block_out_channels"] = [channels // 4 for channels in settings["block_out_channels"]]
        settings["norm_num_groups"] //= 4
    return settings


def planned(options: list[str], narrow: bool) -> dict[str, float]:
    """GiB of each phase of a plan, without the context of a GPU, and with what it has asleep on the CPU: here."""
    from glm_training.config import load_config
    from glm_training.planning.plan import Card, make_plan

    whole = full_width_configuration
    if narrow:
        full_width.full_width_configuration = loading.full_width_configuration = with_narrow_vae
    try:
        plan = make_plan(load_config(CONFIG, options), card=Card(None, "not asked"))
    finally:
        full_width.full_width_configuration = loading.full_width_configuration = whole
    context = plan.phases[0].items["context"]
    asleep = sum(part.frozen * plan.run.dtype for part in plan.memory.parts if part.sleeps)
    return {phase.name: round((phase.total - context + asleep) / GIB, 3) for phase in plan.phases}


def beside_plan(run: dict[str, Any]) -> dict[str, Any]:
    """What was measured of a run, with what its plan says."""
    found = planned(run["options"], run["narrow_vae"])
    for name, told in run["phases"].items():
        if name in PHASES:
            told["planned"] = found[PHASES[name]]
            told["planned to tensors"] = round(told["planned"] / told["tensors"], 3)
    return {**run, "planned peak, GiB": max(found.values())}


def measure(component: str, size: int, precision: str, narrow: bool, gate: bool) -> dict[str, Any]:
    """A step in this process, beside its plan."""
    if narrow:
        full_width.full_width_configuration = loading.full_width_configuration = with_narrow_vae
    from glm_training.config import load_config
    from glm_training.planning.tracing import Alive
    from glm_training.trainers.run import run_training

    before = peak_resident() / GIB
    with tempfile.TemporaryDirectory() as folder:
        options = [*overrides(component, size, precision), f"reward.grpo.gate={gate}", f"output_dir={folder}/run"]
        config = load_config([CONFIG], options)
        alive = Alive()
        meter = Meter(alive)
        meter.watch()
        with alive:
            run_training(config)
        meter.mark("end")
        run = Path(folder) / "run"
        row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        saved = sum(file.stat().st_size for file in (run / "checkpoints").rglob("*") if file.is_file())
    phases = {name: {key: round(value, 3) for key, value in told.items()} for name, told in meter.found.items()}
    found = {
        "component": component,
        "size": size,
        "precision": precision,
        "narrow_vae": narrow,
        "gate": gate,
        "options": options[:-1],
        "resident before, GiB": round(before, 3),
        "phases": phases,
        "peak of tensors, GiB": max(told["tensors"] for told in phases.values()),
        "peak resident, GiB": max(told["resident"] for told in phases.values()),
        "checkpoint, MiB": round(saved / 2**20, 1),
        "logged": {key: row[key] for key in sorted(row) if not key.startswith("learning")},
    }
    return beside_plan(found)


def in_its_own_process(options: list[str]) -> dict[str, Any]:
    """`measure`: what a process held once, its allocator keeps."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as told:
        command = [sys.executable, "-m", "benchmarks.full_width", *options, "--into", told.name]
        subprocess.run(command, cwd=ROOT, check=True)
        found: dict[str, Any] = json.loads(told.read())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--component", choices=list(GROUPS), action="append", help="all three without it")
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side (1024)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument(
        "--narrow-vae", action="store_true", help="a quarter of its channels: it takes most of the time"
    )
    parser.add_argument("--without-gate", action="store_true", help="no replay of the rollout before the update")
    parser.add_argument("--save", action="store_true", help="adds to the file of results")
    parser.add_argument("--replan", action="store_true", help="measures nothing")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.replan:
        runs = json.loads(RESULTS.read_text(encoding="utf-8"))
        RESULTS.write_text(json.dumps([*map(beside_plan, runs)], indent=1) + "\n", encoding="utf-8")
        return
    if asked.into:
        found = measure(asked.component[0], asked.size, asked.precision, asked.narrow_vae, not asked.without_gate)
        asked.into.write_text(json.dumps(found), encoding="utf-8")
        return
    import torch

    machine = {"processor": processor()[0], "threads": torch.get_num_threads(), "torch": torch.__version__}
    for component in asked.component or list(GROUPS):
        options = ["--component", component, "--size", str(asked.size), "--precision", asked.precision]
        options += ["--narrow-vae"] * asked.narrow_vae + ["--without-gate"] * asked.without_gate
        found = {"machine": machine, **in_its_own_process(options)}
        print(json.dumps(found, indent=1), flush=True)
        if asked.save:
            runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
            others = [run for run in runs if any(run[name] != found[name] for name in KEY)]
            RESULTS.write_text(json.dumps([*others, found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
