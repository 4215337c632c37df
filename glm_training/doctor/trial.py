"""A step of training with the tiny model, by one process and by two that need each other."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from glm_training.doctor.commands import Asked, export, reinstall
from glm_training.doctor.findings import Finding, failed, ok
from glm_training.doctor.processes import Ended, module, run_together, slow

ONE, TWO = "training step", "two processes"
WORD = "STOP"
CONFIG = """\
model: {name: tiny, component: both, torch_dtype: float32, dit: {num_inference_steps: 2, guidance_scale: 1.0}}
data: {prompts_file: prompts.txt, target_images_dir: images, num_workers: 0, pin_memory: false,
       image_size: {height: 64, width: 64}}
training: {batch_size: 1, gradient_accumulation_steps: 1, max_steps: 1, lr_scheduler: constant, warmup_steps: 0,
           gradient_checkpointing: false, mixed_precision: "no"}
lora: {enabled: true, rank: 4, alpha: 8}
rollout: {plans_per_prompt: 2, renders_per_plan: 2}
reward: {metrics: {structure: 0.5, text_accuracy: 0.5}, options: {structure: {reference: target}},
         grpo: {num_samples: 4}}
logging: {log_images: false, use_tensorboard: false}
evaluation: {enabled: false}
checkpoint: {save_lora_only: true}
output_dir: run
"""
_OF_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def step(asked: Asked, limit: float) -> Finding:
    """One step, with its rollout, OCR, updates and checkpoint, in a folder that is gone after it."""
    return _tried(ONE, asked, limit, [{}], [])


def two(asked: Asked, limit: float, gpus: int) -> Finding:
    """The same by two processes, on two GPUs where there are so many, else on the CPU."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    both = [meeting | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return _tried(TWO, asked, limit, both, [] if gpus >= 2 else ["model.device_map=cpu"])


def _tried(
    name: str, asked: Asked, limit: float, changes: Sequence[dict[str, str]], overrides: Sequence[str]
) -> Finding:
    command = module("glm_training.cli.main", "train", "--config", "trial.yaml", *overrides)
    try:
        with TemporaryDirectory(prefix="glm-train-doctor-", ignore_cleanup_errors=True) as folder:
            _write(Path(folder))
            begun = time.monotonic()
            ended = run_together(command, changes, limit, Path(folder))
            seconds = time.monotonic() - begun
    except OSError as error:
        return failed(name, f"there is no place for it: {error}", export("TMPDIR", str(Path.home())))
    if all(each.code == 0 for each in ended):
        on = "the processes share one step" if len(ended) > 1 else "both halves of the tiny model learn"
        return ok(name, f"{on}; {seconds:.0f} s with loading", seconds=round(seconds, 1))
    if all(each.code is None for each in ended):
        return slow(name, limit, asked)
    return _broken(name, next(each for each in ended if each.code not in (None, 0)))


def _broken(name: str, ended: Ended) -> Finding:
    """What a run said last. What it says of itself begins with `error:`."""
    said = [number for number, line in enumerate(ended.told) if line.startswith("error: ")]
    lines = ended.told[said[-1] :] if said else ended.told[-1:]
    told = "\n".join(lines).removeprefix("error: ") or f"it ended with code {ended.code} and said nothing"
    facts = {"code": ended.code, "said": list(ended.told)}
    if "No space left" in told or "Disk quota" in told:
        return failed(name, told, export("TMPDIR", str(Path.home())), **facts)
    named = next((variable for variable in _OF_INTERFACES if variable in os.environ), None)
    if name == TWO and named is not None:
        return failed(name, f"{told}\n{named} is {os.environ[named]!r}:", ["unset", named], **facts)
    if name == TWO:
        own = "lo0" if sys.platform == "darwin" else "lo"
        return failed(name, f"{told}\nOn one machine they may meet here:", export("GLOO_SOCKET_IFNAME", own), **facts)
    return failed(name, told, reinstall(), crashed=True, **facts)


def _write(folder: Path) -> None:
    """A configuration, two prompts and their pictures."""
    from PIL import Image, ImageDraw, ImageFont

    (folder / "images").mkdir()
    for index in range(2):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).text((4, 20), WORD, fill="black", font=ImageFont.load_default(size=20))
        picture.save(folder / "images" / f"{index}.png")
    (folder / "prompts.txt").write_text(f'a sign that says "{WORD}"\n' * 2, encoding="utf-8")
    (folder / "trial.yaml").write_text(CONFIG, encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
