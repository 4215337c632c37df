"""OCR, tesseract and the metrics' files: what is said where they are lacking."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glm_training.doctor import scorers, wanted
from glm_training.doctor.commands import Asked
from glm_training.doctor.processes import look
from tests.runs import write_config

TESSERACT = "reward.options.text_accuracy.engine=pytesseract"


def asked_of(tmp_path: Path, *words: str) -> Asked:
    return Asked((str(write_config(tmp_path)),), words)


@pytest.fixture
def text_by_tesseract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A configuration that reads English and Russian by tesseract, on a machine without that program."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    languages = "reward.options.text_accuracy.languages=[eng, chi_sim]"
    return asked_of(tmp_path, "reward.metrics={structure: 0.5, text_accuracy: 0.5}", TESSERACT, languages)


def test_without_tesseract_the_command_installs_it_with_its_languages(text_by_tesseract: Asked) -> None:
    (found,) = scorers.tesseract(text_by_tesseract)
    assert found.status == "failed" and "not on the PATH" in found.message
    installs = "sudo apt-get update && sudo apt-get install -y"
    assert " ".join(found.command) == f"{installs} tesseract-ocr tesseract-ocr-chi-sim"
    assert "pytesseract" in wanted.extras_of(scorers.configuration(text_by_tesseract))


def test_a_language_that_tesseract_lacks_is_installed(text_by_tesseract: Asked, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "tesseract"  # as tesseract 5 lists its languages
    program.write_text(
        "#!/bin/sh\necho 'List of available languages in \"/usr/share/tessdata/\" (2):'\necho eng\necho osd\n"
    )
    program.chmod(0o755)
    (found,) = scorers.tesseract(text_by_tesseract)
    assert "no language chi_sim (it has eng, osd)" in found.message
    assert found.command[-2:] == ("-y", "tesseract-ocr-chi-sim")
    program.write_text(program.read_text() + "echo chi_sim\n")
    assert all("no language" not in each.message for each in scorers.tesseract(text_by_tesseract))


def test_what_is_installed_is_in_debian(text_by_tesseract: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = scorers.tesseract(text_by_tesseract)
    monkeypatch.setenv("PATH", os.defpath)
    if shutil.which("apt-cache") is None:
        pytest.skip("no Debian here")
    packages = list(found.command[found.command.index("-y") + 1 :])
    told = subprocess.run(["apt-cache", "policy", *packages], capture_output=True, text=True, check=True).stdout
    if "tesseract-ocr:" not in told:
        pytest.skip("apt has no lists here")
    assert re.findall(r"^(\S+):$", told, flags=re.MULTILINE) == packages and "Candidate: (none)" not in told


def test_a_machine_without_tesseract_is_told_so_and_is_no_failure(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = scorers.tesseract(Asked())
    assert found.status == "note" and found.command[-1] == "tesseract-ocr"
    assert list(scorers.tesseract(asked_of(tmp_path, TESSERACT))) == []  # no metric reads


def test_ocr_that_does_not_import_is_mended_by_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libonnxruntime.so: bad ELF')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
    (found,) = look(["OCR"], Asked(), limit=200)
    assert found.status == "failed" and "bad ELF" in found.message
    assert found.command[1:5] == ("-m", "pip", "install", "--force-reinstall") and "onnxruntime" in found.command


def test_files_of_metrics_that_are_not_here_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    asked = asked_of(tmp_path, "reward.metrics={lpips: 0.4, aesthetic: 0.3, text_accuracy: 0.3}")
    begun = tmp_path / "torch" / "hub" / "checkpoints" / ".alexnet-owt-7be5be79.pth.part"
    begun.parent.mkdir(parents=True)
    begun.write_bytes(b"x" * 3_000_000)
    found = {each.name: each for each in scorers.scorers(asked)}
    assert "alexnet-owt-7be5be79.pth (3.0 MB of it were fetched" in found["metric lpips"].message
    assert "openai/clip-vit-large-patch14" in found["metric aesthetic"].message
    assert found["metric text_accuracy"].status == "ok"
    for name in ("lpips", "aesthetic"):
        command = found[f"metric {name}"].command
        assert command[command.index("download") + 1 : -1] == ("--config", asked.paths[0])


def test_a_file_that_was_fetched_and_does_not_load_is_removed_first(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    file = tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no state dict")
    (found,) = scorers.scorers(asked_of(tmp_path, "reward.metrics={lpips: 1.0}"))
    assert found.status == "failed" and found.command[:3] == ("rm", str(file), "&&") and "download" in found.command
    given = f"reward.options.lpips.backbone_weights={file}"
    (found,) = scorers.scorers(asked_of(tmp_path, "reward.metrics={lpips: 1.0}", given))
    assert found.command[-1] == "reward.options.lpips.backbone_weights=null" and file.is_file()


def test_rewards_of_the_users_own_are_left_to_validate(tmp_path: Path) -> None:
    asked = asked_of(tmp_path, 'reward.metrics={structure: 0.5, "mine:Own": 0.5}')
    found = {each.name: each for each in scorers.scorers(asked)}
    assert found["rewards"].status == "note" and "mine:Own" in found["rewards"].message
    assert "validate" in found["rewards"].command


def test_without_a_configuration_the_metrics_are_listed() -> None:
    (found,) = scorers.at_hand(Asked())
    assert {"objects", "structure", "text_accuracy"} <= {*found.facts.get("ready", found.message.split(", "))}
