"""Every command of every document runs here, shortened, in the order in which it stands there; or it is marked as one
that takes a GPU, a cluster, a network or hours. Of a model of the hub the configuration is loaded, as overridden."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from glm_training.config import Config, load_config
from glm_training.export import verify
from tests.warm import run, run_two

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("[cdeg]*/**/*.md")])
SHORT = ["training.max_steps=1", "evaluation.num_eval_samples=2"]
SHORT_GRPO = [
    *SHORT,
    "training.batch_size=1",
    "rollout.num_inference_steps=2",
    "reward.grpo.updates_per_rollout=1",
    "evaluation.samples_per_prompt=1",
    "rollout.plans_per_prompt=2",
    "rollout.renders_per_plan=2",
    "reward.grpo.num_samples=4",
]
PROGRAMS = (
    "python",
    "torchrun",
    "glm-train",
    "pip",
    "cp",
    "mkdir",
    "pytest",
    "ruff",
    "bash",
    "sbatch",
    "sky",
    "srun",
    "docker",
    "tensorboard",
)
SCRIPTS = ("train.py", "train_ar.py", "train_dit.py")
MARKED = re.compile(r"(?<!no )(?<!without )(?<!without a )\b(GPUs?|cluster|Slurm|network|hours?)\b(?! memory)|of yours")
"""In the comment behind a command that is not run here; in the quick reference, in what stands before it."""
ELSEWHERE = {
    "pip install": "the environment that this runs in was installed by it (.ci/run)",
    "pytest": "this",
    "docker": "tests/e2e/test_image.py",
    "ruff": "tests/test_quality.py",
    "tensorboard": "a server",
    "python -m tests.newcomer": "minutes, and a network; its steps are those of tests/e2e/test_newcomer.py",
    "python -m tests.mutants.run": "hours; tests/mutants/test_catalogue.py says that all of them apply",
    "python -m benchmarks.": "minutes to hours; what it measured is on the page, or in the file that it names",
    "python benchmarks/": "the same",
    "python test_installation.py": "tests/doctor",
    "glm-train doctor": "tests/doctor",
    "glm-train report runs/quickstart runs/other": "tests/report",
    "python examples/reward_server.py": "tests/e2e/test_remote_reward.py",
    "curl": "tests/e2e/test_remote_reward.py",
    "glm-train train --config configs/quickstart.yaml reward.metrics='{remote": "tests/e2e/test_remote_reward.py",
    "python examples/tiny_glm_image/train.py": "hours",
    "python examples/tiny_glm_image/make_data.py": "writes data/ again",
    "glm-train download": "tests/e2e/test_fetched_files.py",
}
"""How commands begin that something else has run."""


def blocks(name: str) -> Iterator[tuple[str, str]]:
    """(language, text) of the code blocks of a document, fenced or indented; of the quick reference its tables too."""
    language, lines = None, []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        fence = re.match(r"```(\w*)", line)
        if fence and language is None:
            language, lines = fence[1], []
        elif fence:
            yield language or "", "\n".join(lines)
            language = None
        elif language is not None:
            lines.append(line)
        elif line.startswith("    "):
            yield "", line  # a long line that goes on is joined by `commands`
        elif name == "QUICKSTART.md":
            about = line.partition("`")[0].strip("| ")
            yield from (("", f"{code} # {about}") for code in re.findall(r"`([^`]+)`", line))


def commands(name: str) -> list[str]:
    """Lines that start a program, with their comments, in shell blocks and in those that say no language."""
    text = "\n".join(text for language, text in blocks(name) if language in ("", "bash"))
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines()]
    parts = [part.strip() for line in lines for part in line.split(" && ")]
    return [part for part in dict.fromkeys(parts) if part.split(" ")[0] in PROGRAMS or re.match(r"[A-Z_]+=\S+ ", part)]


def to_run(name: str) -> list[str]:
    """Those that are neither marked nor run elsewhere, without comments."""
    found = []
    for command in commands(name):
        words, _, comment = command.partition(" #")
        if not MARKED.search(comment) and not words.startswith(tuple(ELSEWHERE)):
            found.append(words.strip())
    return found


def config_of(command: str) -> Config | None:
    """The configuration of a training command of files that ship, with all that it overrides."""
    words = shlex.split(command, comments=True)
    files = [word for word in words if word.endswith(".yaml")]
    keys = [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)]
    ships = all((ROOT / file).exists() for file in files) and any(script in words for script in SCRIPTS)
    return load_config(files, keys) if files and ships else None


def of_the_hub(command: str) -> bool:
    config = config_of(command)
    return config is not None and "/" in config.model.name and not config.model.name.startswith("runs/")


def shortened(words: list[str]) -> list[str]:
    """A training command that takes one small step, whatever an earlier one left in its folder."""
    files = [word for word in words if word.endswith(".yaml")]
    short = SHORT_GRPO if load_config(files).training.method == "finetune" else SHORT
    own = [word for word in words if word.startswith("output_dir=")]
    again = [] if "--resume" in words or "--overwrite" in words else ["--overwrite"]
    return [*words, *again, *short, *own]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder that looks like a fresh clone, with a reader's own pictures in it."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "pics").mkdir()
    prompts = (ROOT / "data/t2i/prompts.txt").read_text().splitlines()[:8]
    for number, prompt in enumerate(prompts):
        shutil.copy(ROOT / f"data/t2i/target_images/{number}.png", tmp_path / f"pics/{number}.png")
        (tmp_path / f"pics/{number}.txt").write_text(prompt)
    for name in ("mine", "my_set"):
        shutil.copytree(tmp_path / "pics", tmp_path / name / "target_images", ignore=shutil.ignore_patterns("*.txt"))
        (tmp_path / name / "prompts.txt").write_text("\n".join(prompts) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(verify, "python", lambda *words, changes: run(*words, changes=changes, directory=tmp_path))
    return tmp_path


class Trained:
    """Training commands that take one small step. What each has left in its folder serves later documents that have the
    same command, of files that ship: it would do the same again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[tuple[str, ...], Path] = {}

    def run(self, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        words = shortened(given)
        output, before = output_of(words), self._kept.get(tuple(words))
        if before is not None:
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(before, output, symlinks=True)
            return
        run_here(words, monkeypatch)
        if "--overwrite" in words and all((ROOT / word).exists() for word in words if word.endswith(".yaml")):
            kept = self._folder / str(len(self._kept))
            self._kept[tuple(words)] = shutil.copytree(output, kept, symlinks=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def output_of(words: list[str]) -> Path:
    """Where a training command writes."""
    files = [word for word in words if word.endswith(".yaml")]
    return Path(load_config(files, [word for word in words if word.startswith("output_dir=")]).output_dir)


def write_files(name: str) -> None:
    """The files that a document says to write: a block whose first line is a comment with the file's name."""
    for language, text in blocks(name):
        named = re.match(r"# ([\w/]+\.(?:yaml|py))$", text.partition("\n")[0])
        if language in ("yaml", "python") and named:
            Path(named[1]).write_text(text)


def stand_ins(name: str) -> None:
    """Checkpoints that documents and configurations name, which a shortened run has under an earlier step."""
    texts = [path.read_text() for path in [ROOT / name, *ROOT.glob("configs/*.yaml")]]
    named = {
        Path(found) for text in texts for found in re.findall(r"runs/\w+/checkpoints/[\w/]*step-\d+(?:\.pt)?", text)
    }
    for checkpoint in named:
        there = sorted(checkpoint.parent.glob("step-*"))
        if there and not checkpoint.exists():
            checkpoint.symlink_to(there[-1].name)


def first(given: str) -> str:
    """A file with the first two lines of the file `given`, or a folder with two pictures of that folder."""
    short = Path(f"first_{Path(given).name}")
    if Path(given).is_dir():
        short.mkdir()
        for path in sorted(Path(given).iterdir())[:2]:
            shutil.copy(path, short)
    else:
        short.write_text("".join(Path(given).read_text().splitlines(keepends=True)[:2]))
    return str(short)


def lessened(words: list[str]) -> list[str]:
    """Another command, for less."""
    if words[:2] == ["glm-train", "evaluate"]:
        few = [first(word) if word.endswith(("_tiny.jsonl", "target_images")) else word for word in words]
        return [*few, "--samples", "1", "--steps", "1"]
    if words[0].endswith("make_captioned.py"):
        return [*words, "--train", "64", "--held-out", "16"]
    if words[:2] == ["glm-train", "export"]:
        return [*words, "--no-draw"]  # one step changes no picture; tests/export and test_newcomer.py draw
    if words[:2] == ["glm-train", "sample"]:  # VGT draws in two steps or more
        return [*(first(word) if word.endswith("prompts.txt") else word for word in words), "--steps", "2"]
    return words


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The program in this process, which has its libraries loaded already."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        if words[0] == "glm-train":
            runpy.run_module("glm_training.cli.main", run_name="__main__", alter_sys=True)
        elif words[0] == "-m":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        assert stop.code in (0, None), f"{shlex.join(words)} ended with {stop.code}"


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if to_run(name)])
def test_commands(name, place, trained, monkeypatch):
    write_files(name)
    if "runs/quickstart" in to_run(name)[0] and "train.py" not in to_run(name)[0]:  # which its reader has already
        trained.run(["train.py", "--config", "configs/quickstart.yaml"], monkeypatch)
    for command in to_run(name):
        words = shlex.split(command)
        if words[0] == "torchrun":
            launch = parse_args(["--standalone", *words[1:]])
            assert launch.nproc_per_node == "2", command
            for done in run_two(launch.training_script, *shortened(launch.training_script_args)):
                assert done.returncode == 0, done.stdout + done.stderr
        elif words[0] in ("python", "glm-train"):
            words = words[words[0] == "python" :]
            if any(word.endswith(".yaml") for word in words) and (words[0] in SCRIPTS or words[1] == "train"):
                trained.run(words, monkeypatch)
            else:
                run_here(lessened(words), monkeypatch)
        else:
            subprocess.run(["bash", "-c", command], check=True)
        stand_ins(name)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_configurations_of_marked_commands_load(name):
    for command in commands(name):
        config_of(command)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_that_need_the_real_model_are_marked(name):
    """Else a reader without a GPU tries them, and nobody has run them."""
    assert [command for command in to_run(name) if of_the_hub(command)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_benchmarks_write_are_there(name):
    for command in commands(name):
        if command.startswith(("python -m benchmarks.", "python benchmarks/")):
            for path in re.findall(r"benchmarks/results/[\w./-]+", command):
                assert (ROOT / path).exists(), command


def test_the_documents_have_commands():
    assert sum(len(to_run(name)) for name in DOCUMENTS) >= 40


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:configs|examples|data|tests|benchmarks|glm_training)/[\w./-]+)`", text):
        if not path.startswith(("data/i2i/", "benchmarks/results/gpu")) and "*" not in path:
            assert (ROOT / path).exists(), path
