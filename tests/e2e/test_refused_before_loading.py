"""What a run refuses and what can be known without weights: `train` and `validate` refuse it alike, with exit code 2,
before a model is loaded, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_training.checkpoint.commit import save_checkpoint
from glm_training.cli import main
from glm_training.engine import families
from glm_training.engine.resuming import save_context
from glm_training.models.sdxl.family import SDXL
from glm_training.trainers.run import trainer_type
from tests import dmdr_runs, preference_runs, runs

Case = Callable[[Path], list[str]]
"""From a folder to the words after the command."""


def finetuning(folder: Path, *overrides: str) -> list[str]:
    return ["--config", str(runs.write_config(folder)), *overrides]


def preferences(folder: Path, *overrides: str, family: str = "sdxl") -> list[str]:
    preference_runs.config_of(folder, family)
    return ["--config", str(folder / f"{family}.yaml"), *overrides]


def distillation(folder: Path, *overrides: str) -> list[str]:
    dmdr_runs.config_of(folder)
    return ["--config", str(folder / "sdxl.yaml"), *overrides]


def sdxl_folder(folder: Path) -> Path:
    """A whole pipeline of the random tiny SDXL."""
    path = folder / "model"
    SDXL.load("tiny-random").save_pretrained(path)
    return path


def with_model(change: Callable[[Path], None]) -> Case:
    """Preferences on a pipeline folder with something wrong in it."""

    def case(folder: Path) -> list[str]:
        model = sdxl_folder(folder)
        change(model)
        return preferences(folder, f"model.name={model}")

    return case


def rewrite(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def torn(model: Path) -> None:
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def other_shape(folder: Path) -> list[str]:
    weights = load_file(sdxl_folder(folder) / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.bias"] = weights["conv_in.bias"][:-1].clone()
    save_file(weights, folder / "student.safetensors")
    return distillation(folder, f"dmdr.initial_weights={folder}/student.safetensors")


def resuming(*overrides: str, **state: object) -> Case:
    """`--resume` of a run that was made with other keys, or whose checkpoint holds something else."""

    def case(folder: Path) -> list[str]:
        config = runs.config_of(folder)
        dataset, _ = trainer_type(config).build_data(config)
        context = save_context(config, dataset.example_digests())
        states = {"trainer": {"step": 1}, "ar_optimizer": {}, "dit_optimizer": {}} | state
        kept = {name: tree for name, tree in states.items() if tree is not None}
        save_checkpoint(config.checkpoint_dir(), 1, kept, total_limit=None, metadata=context)  # type: ignore[arg-type]
        return finetuning(folder, "checkpoint.resume_from=latest", *overrides)

    return case


def damaged(folder: Path) -> list[str]:
    words = resuming()(folder)
    (folder / "run/checkpoints/step-000001/states/trainer.json").write_text("{}")
    return words


def without_scorers(folder: Path) -> list[str]:
    keys = dmdr_runs.random_scorers(folder)
    (folder / "clip_h" / "open_clip_pytorch_model.bin").unlink()
    (folder / "hps_v2" / "open_clip_pytorch_model.bin").unlink()
    return distillation(folder, *keys)


LORA = "lora.enabled=true"
CASES: dict[str, tuple[Case, list[str]]] = {
    "targets of the AR half": (
        lambda folder: finetuning(folder, LORA, "lora.ar_targets=[q_prj, o_proj]"),
        ["lora.ar_targets: LoRA target 'q_prj' names no linear layer (did you mean 'q_proj'?)", "gate_up_proj"],
    ),
    "targets of both halves": (
        lambda folder: finetuning(folder, LORA, "lora.ar_targets=[qkv]", 'lora.dit_targets=[to_out, "0"]'),
        ["lora.ar_targets: LoRA target 'qkv' reaches", "stays frozen", "lora.dit_targets: ", "'0' reaches", "to_out.0"],
    ),
    "targets of the UNet": (
        lambda folder: preferences(folder, "lora.unet_targets=[to_queue]"),
        ["lora.unet_targets: LoRA target 'to_queue'", "did you mean 'to_q'", "to_out.0", "net.2"],
    ),
    "targets of the guidance network": (
        lambda folder: distillation(folder, "lora.unet_targets=[to_queue]"),
        ["lora.unet_targets: LoRA target 'to_queue'"],
    ),
    "initial weights that are not there": (
        lambda folder: distillation(folder, f"dmdr.initial_weights={folder}/none.bin"),
        ["dmdr.initial_weights: there is no file of weights", "none.bin"],
    ),
    "initial weights of another shape": (other_shape, ["dmdr.initial_weights: ", "1 of", "first conv_in.bias"]),
    "scorers": (without_scorers, ["clip_h: ", "hps_v2: ", "dmdr.reward.clip_h_weights"]),
    "no small decoder": (
        lambda folder: distillation(folder, "model.taesd=null", "dmdr.cold_start_steps=1"),
        ["dmdr.reward.decoder is taesd and tiny-random has none"],
    ),
    "no checkpoint": (
        lambda folder: finetuning(folder, "checkpoint.resume_from=latest"),
        ["there is no checkpoint", "start anew"],
    ),
    "drift": (
        resuming("training.learning_rate=0.1", "data.shuffle=false"),
        ["training.learning_rate: 0.05 -> 0.1", "data.shuffle: True -> False", "resume.accept"],
    ),
    "no optimizer in the checkpoint": (
        resuming(ar_optimizer=None, dit_optimizer=None),
        ["saved with checkpoint.save_optimizer: false"],
    ),
    "a damaged checkpoint": (damaged, ["states/trainer.json has 2 bytes"]),
    "wandb": (lambda folder: finetuning(folder, "logging.use_wandb=true"), ["logging.use_wandb", "wandb"]),
    "bitsandbytes": (
        lambda folder: finetuning(folder, "optimizer.dit.name=adamw_8bit"),
        ["adamw_8bit needs bitsandbytes"],
    ),
    "bitsandbytes for weights in few bits": (
        lambda folder: finetuning(folder, "model.quantization=nf4", "lora.enabled=true"),
        ['model.quantization nf4 needs bitsandbytes: pip install "glm_training[bitsandbytes]"'],
    ),
    "a GPU": (lambda folder: finetuning(folder, "model.device_map=cuda"), ["model.device_map is 'cuda'"]),
    "updates that do not divide": (
        lambda folder: finetuning(folder, "reward.grpo.updates_per_rollout=3"),
        ["updates_per_rollout 3 does not divide"],
    ),
    "a remote reward": (
        lambda folder: finetuning(
            folder, "reward.options.remote.judge.url=http://127.0.0.1:9", "reward.metrics={remote/judge: 1.0}"
        ),
        ["remote/judge: http://127.0.0.1:9/health does not answer"],
    ),
    "a model that is nowhere": (
        lambda folder: finetuning(folder, "model.name=./no/model"),
        ["model.name ./no/model is neither a folder here nor a hub id"],
    ),
    "homes of nobody": (
        lambda folder: finetuning(
            folder, "model.name=~nobody-here/model", 'reward.metrics={"~nobody-here/own.py:Own": 1.0}'
        ),
        ["model.name ~nobody-here/model is neither a folder here nor a hub id", "~nobody-here/own.py"],
    ),
    "a home of nobody to resume from": (
        lambda folder: finetuning(folder, "checkpoint.resume_from=~nobody-here/run"),
        ["there is no checkpoint at ~nobody-here/run"],
    ),
    "a decoder that is none": (
        lambda folder: preferences(folder, f"model.taesd={folder}"),
        ["has no config.json: a TAESD is a folder"],
    ),
    "torn weights": (with_model(torn), ["incomplete or damaged", "unet/diffusion_pytorch_model.safetensors"]),
    "lacking weights": (
        with_model(lambda model: (model / "vae" / "diffusion_pytorch_model.safetensors").unlink()),
        ["vae holds no weights as safetensors"],
    ),
    "an inpainting model": (
        with_model(lambda model: rewrite(model / "unet" / "config.json", in_channels=9)),
        ["the UNet takes 9 channels and the VAE makes 4"],
    ),
    "another noise schedule": (
        with_model(lambda model: rewrite(model / "scheduler/scheduler_config.json", prediction_type="sample")),
        ["prediction_type 'sample'"],
    ),
    "an unreadable few_steps.json": (
        with_model(lambda model: (model / "few_steps.json").write_text("[")),
        ["few_steps.json does not say how to draw"],
    ),
    "three things at once": (
        lambda folder: finetuning(
            folder,
            "lora.enabled=true",
            "lora.dit_targets=[to_x]",
            "logging.use_wandb=true",
            "data.prompts_file=none.txt",
        ),
        ["'to_x' names no linear layer", "logging.use_wandb", "none.txt"],
    ),
}


def listing(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    monkeypatch.setattr(sys, "argv", ["glm-train", *words])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code


@pytest.mark.parametrize("command", ["train", "validate"])
@pytest.mark.parametrize("name", list(CASES))
def test_refused(command, name, tmp_path, monkeypatch, capsys):
    case, parts = CASES[name]
    words = case(tmp_path)
    before = listing(tmp_path)
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    found = importlib.util.find_spec
    hidden = "bitsandbytes"  # which may be here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else found(name))

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(families, "load_family", loaded)
    code = run(monkeypatch, command, *words)
    told = capsys.readouterr().err
    assert code == 2, told
    for part in parts:
        assert part in told, (part, told)
    assert listing(tmp_path) == before


def test_a_hub_model_is_known_by_its_configuration_alone(tmp_path, monkeypatch, capsys):
    """Not here and not to be asked for: nothing can be said. With its small files in the cache: targets are checked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = preferences(tmp_path, "model.name=owner/model", "lora.unet_targets=[to_queue]")
    assert run(monkeypatch, "validate", *words) == 0
    told = capsys.readouterr()
    assert "note: cannot load owner/model" in told.out and "lora targets, were not checked" in told.out
    folder = tmp_path / "cache" / "models--owner--model"
    kept = folder / "snapshots" / ("0" * 40)
    shutil.copytree(sdxl_folder(tmp_path), kept, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    assert run(monkeypatch, "validate", *words) == 2
    assert "lora.unet_targets: LoRA target 'to_queue' names no linear layer" in capsys.readouterr().err
    assert run(monkeypatch, "validate", *words[:-1]) == 0
