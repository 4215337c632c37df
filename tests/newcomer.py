"""A newcomer's way from nothing to a picture of the exported model: how long does each step of it take?

    python -m tests.newcomer --out benchmarks/results/newcomer.json

Clones this repository as it is committed, installs it into a fresh environment, and takes every step in the clone with
the commands of that environment, each of which has to come out right: the quickstart (two steps of it), its page in a
browser, a reward and pictures of one's own, a benchmark, an export, stock diffusers. Prints a table. Needs a network
for the installation and some 10 GB of disk; with OMP_NUM_THREADS=1 on a machine that has other work.
tests/e2e/test_newcomer.py walks the same way in the tree that is there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.quickstart import ROOT, machine
from glm_training.utils.console import Console
from tests.browser import Browser, found

SHORT = (
    "training.max_steps=2",
    "training.batch_size=2",
    "rollout.plans_per_prompt=4",
    "evaluation.num_eval_samples=2",
    "evaluation.samples_per_prompt=1",
    "logging.save_interval=2",
)
REWARD = """
from glm_training.rewards import RewardCalculator


class Red(RewardCalculator):
    def compute_reward(self, generated_image, target_image, prompt):
        return sum(generated_image.resize((8, 8)).getchannel("R").tobytes()) / (255 * 64)
"""
OWN = """
model: {name: tiny, torch_dtype: float32, component: dit}
data: {images: pics, validation: 0.25}
lora: {enabled: true}
training: {batch_size: 2, max_steps: 2, learning_rate: 1.0e-3, warmup_steps: 1, mixed_precision: "no"}
output_dir: runs/own_pictures
"""
STOCK = """
import sys
import torch
from diffusers import GlmImagePipeline
torch.manual_seed(0)
pipe = GlmImagePipeline.from_pretrained(sys.argv[1])
drawn = pipe(prompt="a red circle", height=128, width=128, num_inference_steps=2, guidance_scale=1.0)
drawn.images[0].save(sys.argv[2])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    spent: dict[str, float] = {}
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        clone, programs = Path(folder) / "clone", Path(folder) / "environment/bin"
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment = kept | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}

        def run(*words: str) -> str:
            place = clone if clone.exists() else ROOT
            program = programs / words[0]
            command = [str(program) if program.exists() else words[0], *words[1:]]
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
            return done.stdout

        timed(spent, "clone", lambda: run("git", "clone", "-q", str(ROOT), str(clone)))
        timed(spent, "environment", lambda: run(sys.executable, "-m", "venv", str(programs.parent)))
        timed(spent, "install", lambda: run("pip", "install", "-q", "--no-cache-dir", "-e", "."))
        walk(clone, run, spent)
    table(spent)
    report = {
        "machine": machine(),
        "python": platform.python_version(),
        "load_before": round(load, 1),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "seconds": {name: round(seconds, 1) for name, seconds in spent.items()},
        "whole": round(sum(spent.values()), 1),
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timed(spent: dict[str, float], name: str, step: Callable[[], object]) -> None:
    """Takes a step, and writes its seconds into `spent`."""
    started = time.monotonic()
    step()
    spent[name] = time.monotonic() - started


def table(spent: dict[str, float]) -> None:
    """To the terminal, a row for each step."""
    rows = [(name, f"{seconds:.1f}") for name, seconds in spent.items()]
    Console().table("", ("step", "seconds"), [*rows, ("whole", f"{sum(spent.values()):.1f}")])


def walk(clone: Path, run: Callable[..., str], spent: dict[str, float]) -> None:
    """Every step behind the installation, in `clone`, with its seconds in `spent`. run: of the words of a command what
    it prints, or an error where it fails. Raises AssertionError for a step that came out wrong."""
    write_own(clone)
    quickstart = ("python", "train.py", "--config", "configs/quickstart.yaml", *SHORT)
    timed(spent, "quickstart, 2 steps", lambda: run(*quickstart))
    page = clone / "runs/quickstart/report.html"
    text = page.read_text(encoding="utf-8")
    assert "exactly right" in text and not re.search(r"(?:src|href)=[\"']?https?:", text)
    program = found()
    if program is not None:
        timed(spent, "report open", lambda: open_page(program, page))

    red = ("reward.dit.weights=null", 'reward.metrics={"my_reward:Red": 1.0}', "reward.monitors.action=warn")
    timed(spent, "own reward, 2 steps", lambda: run(*quickstart, "output_dir=runs/own_reward", *red))
    lines = (clone / "runs/own_reward/metrics.jsonl").read_text().splitlines()
    rewards = [row["reward/total"] for line in lines if "reward/total" in (row := json.loads(line))]
    assert len(rewards) == 2 and all(0 < reward < 1 for reward in rewards), rewards

    timed(spent, "own pictures, 2 steps", lambda: run("python", "train.py", "--config", "own.yaml"))
    assert (clone / "runs/own_pictures/checkpoints/step-000002/lora_dit/adapter_model.safetensors").is_file()

    evaluate = ("glm-train", "evaluate", "--suite", "text", "--prompts", "two.jsonl", "--model", "runs/quickstart")
    short = ("--steps", "2", "--samples", "1", "--out", "runs/text")
    timed(spent, "evaluate, 2 prompts", lambda: run(*evaluate, *short))
    assert json.loads((clone / "runs/text/results.json").read_text())

    told: list[str] = []
    export = ("glm-train", "export", "runs/quickstart", "--format", "pipeline", "--out", "exported")
    timed(spent, "export", lambda: told.append(run(*export)))
    wanted = ("bit for bit", "so does the stock pipeline's own call")  # the trainer's picture
    assert all(words in told[0] for words in wanted), told
    timed(spent, "stock pipeline", lambda: run("python", "-c", STOCK, "exported", "stock.png"))
    saved = "runs/quickstart/checkpoints/step-000002/pipeline"
    timed(spent, "stock pipeline, of the checkpoint", lambda: run("python", "-c", STOCK, saved, "saved.png"))
    drawn, kept = (np.asarray(Image.open(clone / name)) for name in ("stock.png", "saved.png"))
    assert drawn.shape == (128, 128, 3) and drawn.std() > 10 and (drawn == kept).all()


def write_own(clone: Path) -> None:
    """What a newcomer has: a reward, a configuration, pictures with captions, a list of prompts."""
    (clone / "my_reward.py").write_text(REWARD)
    (clone / "own.yaml").write_text(OWN)
    (clone / "pics").mkdir()
    for number, prompt in enumerate((clone / "data/t2i/prompts.txt").read_text().splitlines()[:8]):
        shutil.copy(clone / f"data/t2i/target_images/{number}.png", clone / f"pics/{number}.png")
        (clone / f"pics/{number}.txt").write_text(prompt)
    prompts = (clone / "data/benchmarks/text_tiny.jsonl").read_text().splitlines(True)[:2]
    (clone / "two.jsonl").write_text("".join(prompts))


def open_page(program: str, page: Path) -> None:
    """In a headless Chromium: it draws its charts, tells no error and asks for nothing."""
    with TemporaryDirectory() as profile:
        browser = Browser(program, Path(profile))
        try:
            browser.open(page)
            browser.until("charts.length > 0 && charts.some((chart) => chart.ready)")
            assert browser.faults == [], browser.faults
            others = [each for each in browser.requests if not each.startswith("data:image/")]
            assert set(others) <= {browser.address, "about:blank"}, others
        finally:
            browser.close()


if __name__ == "__main__":
    main()
