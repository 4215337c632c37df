"""GPUs: why there is none, and what a run takes of one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch

from glm_training.cli import main
from glm_training.doctor import devices, memory, wanted
from glm_training.doctor.commands import Asked
from tests.runs import write_config

GIB = 1 << 30
T2I = str(Path(__file__).parents[2] / "configs" / "t2i_training.yaml")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system whose /proc, /dev and /sys are in a folder, with nothing in them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("DRIVER", "NODE", "PCI"):
        monkeypatch.setattr(devices, name, tmp_path / name)
    return tmp_path


def card(system: Path, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    (system / "PCI" / "0000:00:04.0").mkdir(parents=True)
    (system / "PCI" / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    (system / "PCI" / "0000:00:04.0" / "class").write_text(f"{kind}\n")


def only() -> devices.Finding:
    (found,) = devices.devices(Asked())
    return found


def test_a_machine_without_a_gpu_is_told_so_and_is_no_failure(system: Path) -> None:
    card(system, vendor="0x1af4")
    assert only().status == "note" and "none here" in only().message


def test_each_cause_has_its_command(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card(system)
    assert "no driver" in only().message and only().command[-1] in ("nvidia-driver", "install")
    (system / "DRIVER").write_text("NVRM version: 550\n")
    assert "container" in only().message and only().command[:4] == ("docker", "run", "--gpus", "all")
    (system / "NODE").write_text("")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in only().message
    assert f"torch=={torch.__version__.partition('+')[0]}" in only().command
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert "does not serve torch" in only().message and "nvidia-driver" in only().command
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only().status == "note" and only().command == ("unset", "CUDA_VISIBLE_DEVICES")


def test_a_device_that_is_not_there_is_left_to_the_program(system: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    (found,) = wanted.optimizers(Asked((config,), ("model.device_map=cuda",)))
    assert found.status == "failed" and found.command[-1] == "model.device_map=null"
    assert [each.status for each in wanted.optimizers(Asked((config,), ("model.device_map=null",)))] == ["ok"]


def test_an_optimizer_of_newer_libraries_has_their_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    muon = ("training.optimizer=muon",)
    (found,) = wanted.optimizers(Asked((str(write_config(tmp_path)),), muon))
    assert "needs torch 2.9" in found.message and found.command[-3:] == ("--upgrade", "torch", "torchvision")


def test_a_large_model_without_a_gpu_is_told_which_has_room(system: Path, monkeypatch, capsys) -> None:
    (found,) = memory.memory(Asked((T2I,)))
    assert found.status == "failed" and "need a GPU, and there is none" in found.message
    words = shlex.split(" ".join(found.command))
    monkeypatch.setattr(sys, "argv", ["glm-train", *words[words.index("plan") :]])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert stop.value.code == 0 and "it fits" in capsys.readouterr().out


def test_a_small_model_without_a_gpu_trains_on_the_cpu(system: Path, tmp_path: Path) -> None:
    assert [each.status for each in memory.memory(Asked((str(write_config(tmp_path)),)))] == ["ok"]


def finding_with(monkeypatch: pytest.MonkeyPatch, sizes: list[float], *overrides: str) -> memory.Finding:
    monkeypatch.setattr(memory, "_cards", lambda config: [int(size * GIB) for size in sizes])
    (found,) = memory.memory(Asked((T2I,), overrides))
    return found


def test_keys_that_make_it_fit_make_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = ("rollout.micro_batch_size=8", "evaluation.samples_per_prompt=4", "training.batch_size=2")
    found = finding_with(monkeypatch, [44], *heavy)
    assert found.status == "failed" and "with these keys it fits" in found.message
    added = found.command[found.command.index(heavy[-1]) + 1 :]
    assert added and finding_with(monkeypatch, [44], *heavy, *added).status == "ok"


def test_what_is_for_one_process_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")
    found = finding_with(monkeypatch, [80] * 8, *whole, "training.offload_between_phases=true")
    assert found.status == "failed" and "share it" not in found.message
    found = finding_with(monkeypatch, [80], *whole, "training.optimizer=adafactor", "distributed.strategy=fsdp")
    assert found.status == "note" and "adafactor of the ar half does not work on shards" in found.message


def test_several_gpus_share_what_one_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")
    alone = finding_with(monkeypatch, [80], *whole)
    assert alone.status == "failed"
    found = finding_with(monkeypatch, [80] * 8, *whole)
    assert "8 share it" in found.message and "--nproc_per_node" in found.command
    assert found.command[-1] == "distributed.strategy=fsdp"


def test_what_no_key_mends_is_told_with_the_gpu_that_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    found = finding_with(monkeypatch, [4])
    assert "no key mends" in found.message and found.command[-2] == "--gpu-memory"
    assert isinstance(found.facts["peak"], float)
