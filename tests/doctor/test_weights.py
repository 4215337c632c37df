"""A model that is in the cache in part, or damaged, as huggingface_hub lays it out: the command brings the rest."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_training.cli.download import download
from glm_training.doctor import weights
from glm_training.doctor.commands import Asked
from glm_training.doctor.findings import Finding
from tests.file_server import FileServer, serving
from tests.runs import write_config

REPOSITORY = "owner/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A hub with a small SDXL, and an empty cache."""
    from glm_training.models.sdxl.family import SDXL

    SDXL.load("tiny-random").save_pretrained(tmp_path / "served" / "hub" / REPOSITORY)
    with serving(tmp_path / "served") as server:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    keys = ("model.family=sdxl", "model.component=unet", f"model.name={REPOSITORY}")
    more = ("training.method=dpo", "data.pairs=pairs", "data.prompts_file=null", "data.target_images_dir=null")
    return Asked((str(write_config(tmp_path)),), (*keys, *more))


def found(asked: Asked) -> Finding:
    (finding,) = weights.model(asked)
    return finding


def type_in(command: tuple[str, ...], asked: Asked) -> None:
    """The command of a finding; its download in this process, which knows the hub."""
    words = shlex.split(" ".join(command))
    if "&&" in words:
        cut = words.index("&&")
        subprocess.run(words[:cut], check=True)
        words = words[cut + 1 :]
    assert words[words.index("download") + 1 :] == ["--config", asked.paths[0], *asked.overrides]
    assert download(list(asked.paths), list(asked.overrides), None) == 0


def snapshot(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "cache" / "models--owner--model" / "snapshots").iterdir()
    return folder


def test_a_model_that_is_not_here_is_fetched(hub, asked) -> None:
    before = found(asked)
    assert before.status == "failed" and "it is not in the cache" in before.message
    type_in(before.command, asked)
    assert found(asked).status == "ok"


def test_offline_the_command_asks_the_hub_all_the_same(hub, asked, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert found(asked).command[0] == "HF_HUB_OFFLINE=0"


def test_half_a_model_is_brought_to_its_end(hub, asked, tmp_path) -> None:
    type_in(found(asked).command, asked)
    link = snapshot(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    blob = link.resolve()
    data = blob.read_bytes()
    link.unlink()
    blob.unlink()  # what a download that was killed leaves: the beginning, under a name of its own
    blob.with_name(f"{blob.name}.0a1b2c3d.incomplete").write_bytes(data[: len(data) // 2])
    before = found(asked)
    assert before.status == "failed" and "only a part of it is in the cache" in before.message
    assert f"{len(data) / 2e9:.2f} GB of a download that broke off" in before.message
    (machine,) = weights.broken_off(Asked())
    assert machine.status == "note" and "of owner/model broke off" in machine.message
    assert machine.command[:3] == ("hf", "download", "owner/model") and str(machine.command[-1]).endswith(".incomplete")
    type_in(before.command, asked)
    assert found(asked).status == "ok" and link.read_bytes() == data
    subprocess.run(machine.command[machine.command.index("rm") :], check=True)
    assert [each.status for each in weights.broken_off(Asked())] == ["ok"]


def test_a_link_to_a_blob_that_is_gone_counts_as_lacking(hub, asked, tmp_path) -> None:
    type_in(found(asked).command, asked)
    (snapshot(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors").resolve().unlink()
    before = found(asked)
    assert before.status == "failed" and "only a part" in before.message
    type_in(before.command, asked)
    assert found(asked).status == "ok"


def test_a_torn_file_is_removed_and_fetched_anew(hub, asked, tmp_path) -> None:
    type_in(found(asked).command, asked)
    file = snapshot(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.resolve().write_bytes(whole[:-1])
    before = found(asked)
    assert before.status == "failed" and "damaged: diffusion_pytorch_model.safetensors" in before.message
    assert before.command[0] == "rm"
    type_in(before.command, asked)
    assert found(asked).status == "ok" and file.read_bytes() == whole


def test_a_folder_that_is_no_model_may_be_replaced_by_the_hubs(tmp_path) -> None:
    config = str(write_config(tmp_path))
    asked = Asked((config,), (f"model.name={tmp_path}",))
    finding = found(asked)
    assert finding.status == "failed" and "no model_index.json" in finding.message
    assert finding.command[-1] == "model.name=zai-org/GLM-Image"
    assert found(Asked((config,))).status == "ok"
