"""A run with the documented metrics on a machine that has none of their files: with hosts that have them, and without.

A server of this machine stands in for the hosts; the caches are empty folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest
import torch

from glm_training.cli.download import download
from glm_training.cli.validate import validate
from glm_training.evaluation.reconstruction.suite import Reconstruction, alexnet
from glm_training.evaluation.suites.protocol import EvaluationError
from glm_training.evaluation.text.suite import ClipScorer
from glm_training.rewards.clip import ClipPair
from glm_training.utils.downloads import MIRROR, sha256_of
from glm_training.utils.hub_files import fetch_where_allowed
from tests.file_server import FileServer, serving
from tests.reward_files import write_aesthetic, write_alexnet, write_clip
from tests.runs import write_config

DOCUMENTED = "reward.metrics={lpips: 0.4, aesthetic: 0.3, text_accuracy: 0.3}"
PREDICTOR = "github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"
CLIP = "hub/openai/clip-vit-large-patch14"

# Random weights cannot have the checksums of the published ones: those two constants alone are other ones.
RUN = """
import sys
from glm_training.rewards import aesthetic, lpips_similarity
lpips_similarity.ALEXNET_URL, aesthetic.MLP_SHA256 = sys.argv[1:3]
del sys.argv[1:3]
from glm_training.cli.main import main
main()
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[FileServer]:
    """The documented metrics' files, with random weights."""
    served = tmp_path / "served"
    models = served / "download.pytorch.org" / "models"
    models.mkdir(parents=True)
    alexnet = write_alexnet(models / "alexnet.pth")
    alexnet.rename(models / f"alexnet-owt-{sha256_of(alexnet)[:8]}.pth")
    files = write_aesthetic(tmp_path)
    (served / PREDICTOR).parent.mkdir(parents=True)
    shutil.move(files.mlp_weights, served / PREDICTOR)
    (served / CLIP).parent.mkdir(parents=True)
    shutil.move(files.clip_name, served / CLIP)
    with serving(served) as server:
        yield server


def constants(server: FileServer) -> list[str]:
    (alexnet,) = (server.root / "download.pytorch.org" / "models").iterdir()
    return [f"https://download.pytorch.org/models/{alexnet.name}", sha256_of(server.root / PREDICTOR)]


def run(server: FileServer, tmp_path: Path, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    changes = {"HF_HOME": f"{tmp_path}/hf", "TORCH_HOME": f"{tmp_path}/torch", "HF_HUB_OFFLINE": str(int(offline))}
    environment = os.environ | changes | {"HF_ENDPOINT": server.address, MIRROR: server.address}
    command = [sys.executable, "-c", RUN, *constants(server), *words, "--config", str(write_config(tmp_path))]
    metrics = [DOCUMENTED, "training.max_steps=1", "model.component=dit", "rollout.renders_per_plan=2"]
    return subprocess.run([*command, *metrics], env=environment, capture_output=True, text=True, timeout=300)


def test_the_documented_metrics_fetch_their_files_before_the_model_is_loaded(hosts: FileServer, tmp_path: Path) -> None:
    hosts.breaks_after = 5_000_000  # the AlexNet's, which goes on where it broke off
    done = run(hosts, tmp_path, "train")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("fetching")]
    assert [line.split()[1].rstrip(",") for line in told] == [
        Path(constants(hosts)[0]).name,
        "sac+logos+ava1-l14-linearMSE.pth",
        "openai/clip-vit-large-patch14",
    ]
    assert lines.index(told[-1]) < lines.index("loading tiny-random")
    assert hosts.bodies(Path(constants(hosts)[0]).name) == [None, "bytes=5000000-"]
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    assert sha256_of(checkpoints / "sac+logos+ava1-l14-linearMSE.pth") == constants(hosts)[1]
    assert '"reward/aesthetic"' in (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.fixture
def here(hosts: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    """This process on that machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(MIRROR, hosts.address)
    monkeypatch.setattr("torch.hub._hub_dir", None, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hosts.address)
    template = f"{hosts.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    url, sha256 = constants(hosts)
    monkeypatch.setattr("glm_training.rewards.lpips_similarity.ALEXNET_URL", url)
    monkeypatch.setattr("glm_training.rewards.aesthetic.MLP_SHA256", sha256)
    return hosts


def test_a_damaged_file_ends_the_run_before_the_model_is_loaded(here, tmp_path, capsys) -> None:
    (here.root / CLIP / "config.json").unlink()
    with (here.root / PREDICTOR).open("r+b") as file:
        file.write(b"?")
    assert validate([str(write_config(tmp_path))], [DOCUMENTED], None) == 2
    told = capsys.readouterr().err
    assert "is not sac+logos+ava1-l14-linearMSE.pth: its SHA-256 is" in told
    assert "aesthetic: openai/clip-vit-large-patch14 on the hub lacks files" in told
    assert "aesthetic: predictor weights not found" in told


def test_nothing_is_fetched_for_a_run_that_cannot_start(here, tmp_path, monkeypatch, capsys) -> None:
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    keys = [DOCUMENTED, "training.optimizer=adamw_8bit"]
    assert validate([str(write_config(tmp_path))], keys, None) == 2
    assert here.asked == []
    told = capsys.readouterr().err
    assert "adamw_8bit" in told and "not found" not in told  # what would be fetched is no fault


def test_download_fetches_model_and_metrics_and_says_sizes(here, tmp_path, capsys) -> None:
    from glm_training.models.sdxl.family import SDXL

    SDXL.load("tiny-random").save_pretrained(here.root / "hub" / "owner" / "model")
    (here.root / "hub" / "owner" / "model" / "single_file.safetensors").write_bytes(b"\0" * 1_000_000)
    path = str(write_config(tmp_path))
    # `local_files_only` is for the machine that trains
    keys = ["model.family=sdxl", "model.component=unet", "model.name=owner/model", "model.local_files_only=true"]
    keys += ["training.method=dpo", "data.pairs=pairs", "data.prompts_file=null", "data.target_images_dir=null"]
    keys += ["reward.enabled=true", "evaluation.enabled=true", "reward.metrics={aesthetic: 1.0}"]
    assert download([path], keys, None) == 0
    told = capsys.readouterr().out
    for name in ("owner/model", "sac+logos+ava1-l14-linearMSE.pth", "openai/clip-vit-large-patch14"):
        assert any(line.startswith(name) and line.endswith("B") for line in told.splitlines()), told
        assert f"fetched {name}\n" in told
    fetched = {found.name for found in (tmp_path / "cache" / "models--owner--model").rglob("*.safetensors")}
    assert "diffusion_pytorch_model.safetensors" in fetched and "single_file.safetensors" not in fetched
    asked = len(here.bodies(".safetensors"))
    assert download([path], keys, None) == 0
    assert "fetched" not in capsys.readouterr().out.replace("that can be fetched", "")
    assert len(here.bodies(".safetensors")) == asked


def test_download_says_what_cannot_be_had_and_fetches_the_rest(here, tmp_path, capsys) -> None:
    (here.root / PREDICTOR).unlink()
    assert download([str(write_config(tmp_path))], [DOCUMENTED], None) == 1
    told = capsys.readouterr()
    assert "sac%2Blogos%2Bava1-l14-linearMSE.pth cannot be had (HTTP 404" in told.err
    assert "fetched openai/clip-vit-large-patch14" in told.out


def test_download_without_a_network_says_so(tmp_path, capsys) -> None:
    assert download([str(write_config(tmp_path))], [DOCUMENTED], None) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_an_evaluation_fetches_the_alexnet_and_the_clip_that_it_judges_by(here, tmp_path, capsys) -> None:
    write_clip(here.root / "hub" / "owner" / "clip")
    Reconstruction(None, None, None, alexnet(None)).check_judge()  # type: ignore[arg-type]
    assert f"fetching {Path(constants(here)[0]).name}, " in capsys.readouterr().out
    with pytest.raises(EvaluationError, match=r"owner/absent cannot be had .*\n.*give --clip"):
        ClipScorer("owner/absent").check()
    told = capsys.readouterr().out
    assert "fetching" not in told
    problems = fetch_where_allowed(
        ClipPair("--clip", ("owner/clip", ""), ("owner/clip", ""), torch.device("cpu")).wanted(), print
    )
    assert problems == [] and "fetching owner/clip, " in capsys.readouterr().out
