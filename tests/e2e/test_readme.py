"""Every command of README, QUICKSTART and USAGE runs, shortened; of those for a GPU the configuration is loaded."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from glm_training.config import load_config
from tests.report_runs import write_run
from tests.warm import run_two

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", "QUICKSTART.md", "examples/USAGE.md", "docs/architecture.md", "docs/coming_from.md"]
DOCUMENTS += ["docs/hardware.md", "docs/compatibility.md"]
SHORT = [
    "training.max_steps=1",
    "evaluation.num_eval_samples=2",
    "training.batch_size=1",
    "rollout.num_inference_steps=2",
    "reward.grpo.updates_per_rollout=1",
    "evaluation.samples_per_prompt=1",
    "rollout.plans_per_prompt=2",
    "rollout.renders_per_plan=2",
    "reward.grpo.num_samples=4",
]
PROGRAMS = ("python", "torchrun", "glm-train")
SCRIPTS = ("train.py", "train_ar.py", "train_dit.py")


def commands() -> list[str]:
    """Programs of ours in bash blocks, and in the tables of the quick reference; each once."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        found += [part.strip() for line in lines for part in line.split("&&")]
        if name == "QUICKSTART.md":
            found += re.findall(r"`([^`]+)`", text)
    return [part for part in dict.fromkeys(found) if part.split(" ")[0] in PROGRAMS and "--help" not in part]


def of_the_hub(command: str) -> bool:
    """Whether the command trains a model of the hub; its configuration is loaded with all that it overrides."""
    files = re.findall(r"configs/[\w/]+\.yaml", command)
    overrides = [word for word in shlex.split(command) if re.match(r"[a-z_]+(\.\w+)*=", word)]
    return bool(files) and "/" in load_config(files, overrides).model.name


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in this process, which has its libraries loaded already."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr("sys.path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as stop:
        if words[0] == "glm-train":
            runpy.run_module("glm_training.cli.main", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert stop.value.code in (0, None)


def test_the_documents_have_commands():
    assert len(commands()) >= 20


@pytest.mark.parametrize("command", [part for part in commands() if not part.startswith("torchrun")])
def test_command(command, tmp_path, monkeypatch):
    words = shlex.split(command.removeprefix("python "))
    if words[0] == "test_installation.py" or of_the_hub(command):
        return
    if words[0] in SCRIPTS:
        files = re.findall(r"configs/[\w/]+\.yaml", command)
        short = SHORT if load_config(files).training.method == "finetune" else SHORT[:2]
        words = [word for word in words if word != "--resume"] + [*short, f"output_dir={tmp_path}/run"]
    if "--model runs/" in command:  # what a run left: the quick reference's own
        return
    if words[:2] == ["glm-train", "data"]:
        words.append(f"output_dir={tmp_path}/run")
    if words[:2] == ["glm-train", "report"]:
        folders = [write_run(tmp_path / word, {1: {"total": [0.1, 0.4]}}) for word in words[2:]]
        words = [*words[:2], *map(str, folders), "--out", str(tmp_path / "page.html")]
    if "sample" in words:
        words += ["--out", str(tmp_path), "--steps", "2"]
    run_here(words, monkeypatch)


@pytest.mark.parametrize("command", [part for part in commands() if part.startswith("torchrun")])
def test_command_of_several_processes(command, tmp_path):
    if of_the_hub(command):
        return
    launch = parse_args(["--standalone", *shlex.split(command)[1:]])
    assert launch.nproc_per_node == "2"
    for done in run_two(launch.training_script, *launch.training_script_args, *SHORT, f"output_dir={tmp_path}/run"):
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCUMENTS)
def test_local_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / name).parent / link).exists(), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:configs|examples|data|tests|benchmarks|glm_training)/[\w./-]+)`", text):
        if not path.startswith("data/i2i/") and "*" not in path:
            assert (ROOT / path).exists(), path
