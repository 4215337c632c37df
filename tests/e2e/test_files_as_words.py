"""A configuration file may be named without --config, by every command that takes one."""

from __future__ import annotations

import argparse
import sys

import pytest

from glm_training.cli import main as cli
from glm_training.cli import training
from glm_training.cli.arguments import gather_files
from tests.runs import write_config


def gathered(*words: str, config: list[str] | None = None) -> tuple[list[str], list[str]]:
    arguments = argparse.Namespace(config=config, overrides=list(words))
    named = [word for file in config or () for word in ("--config", file)]
    gather_files(argparse.ArgumentParser(), arguments, [*named, *words])
    return arguments.config, arguments.overrides


def test_words_without_an_equals_sign_are_files(tmp_path):
    odd = tmp_path / "lr=1e-3"
    odd.mkdir()
    (odd / "config.yaml").write_text("seed: 1\n")
    (odd / "config").write_text("seed: 1\n")
    assert gathered("a.yaml", "seed=1", "b.yml") == (["a.yaml", "b.yml"], ["seed=1"])
    assert gathered("b.yaml", config=["a.yaml"]) == (["a.yaml", "b.yaml"], [])
    assert gathered(str(odd / "config.yaml"), "output_dir=x.yaml") == (
        [str(odd / "config.yaml")],
        ["output_dir=x.yaml"],
    )
    assert gathered("a.yaml", "seed") == (["a.yaml"], ["seed"])  # which is then no key.path=value


def test_no_file_at_all_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        gathered("seed=1")
    assert exit_.value.code == 2 and "no configuration: name its YAML file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gathered("seed=1", "configs/quickstart.yml~")
    assert "no configuration: `configs/quickstart.yml~` is no file; name" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["{file}"], ["{file}", "seed=5"], ["seed=5", "{file}", "--mode", "t2i", "{over}"]])
def test_validate_and_train_take_a_file_as_a_word(form, tmp_path, monkeypatch, capsys):
    (tmp_path / "over.yaml").write_text("training: {max_steps: 7}\n")
    words = [word.format(file=write_config(tmp_path), over=tmp_path / "over.yaml") for word in form]
    monkeypatch.setattr(sys, "argv", ["glm-train", "validate", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 0 and "is fine: 4 training prompts" in capsys.readouterr().out
    taken = []
    monkeypatch.setattr(training, "_train", lambda config, **how: taken.append(config) or 0)
    for command, entry in ((["glm-train", "train"], cli.main), (["train.py"], training.main)):
        monkeypatch.setattr(sys, "argv", [*command, *words])
        with pytest.raises(SystemExit):
            entry()
    steps = 7 if "{over}" in form else 2
    assert [(config.seed, config.training.max_steps) for config in taken] == [(5 if "seed=5" in form else 3, steps)] * 2


@pytest.mark.parametrize("point", ["runs/a #3", "0123", "null", "a: b", "[x]", "step-1"])
def test_the_point_to_resume_from_is_a_text(point, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(training, "_train", lambda config, **how: taken.append(config) or 0)
    monkeypatch.setattr(sys, "argv", ["glm-train", "train", str(write_config(tmp_path)), "--resume", point])
    with pytest.raises(SystemExit):
        cli.main()
    assert taken[0].checkpoint.resume_from == point


ENTRIES = [(["glm-train", "train"], cli.main), (["train.py"], training.main)]


@pytest.mark.parametrize(("command", "entry"), ENTRIES, ids=["glm-train", "train.py"])
@pytest.mark.parametrize(
    ("words", "resume", "steps"),
    [
        (["{file}", "training.max_steps=5", "--resume", "training.max_steps=6", "training.max_steps=7"], "latest", 7),
        (["training.max_steps=5", "{file}", "--resume", "training.max_steps=6", "seed=4"], "latest", 6),
        (["{file}", "training.max_steps=5", "--resume=training.max_steps=6"], "latest", 6),
        (["{file}", "--res", "training.max_steps=6", "training.max_steps=7"], "latest", 7),
        (["{file}", "training.max_steps=5", "--resume", "auto", "training.max_steps=6"], None, 6),
        (["{file}", "--resume", "step-1", "training.max_steps=6", "training.max_steps=7"], "step-1", 7),
        (["--resume", "{file}", "training.max_steps=6"], "latest", 6),
        (["{file}", "--resume", "{over}", "seed=4"], "latest", 9),
    ],
)
def test_what_comes_later_on_the_command_line_is_taken(command, entry, words, resume, steps, tmp_path, monkeypatch):
    (tmp_path / "over.yaml").write_text("training: {max_steps: 9}\n")
    taken = []
    monkeypatch.setattr(training, "_train", lambda config, **how: taken.append(config) or 0)
    words = [word.format(file=write_config(tmp_path), over=tmp_path / "over.yaml") for word in words]
    monkeypatch.setattr(sys, "argv", [*command, *words])
    with pytest.raises(SystemExit):
        entry()
    assert (taken[0].checkpoint.resume_from, taken[0].training.max_steps) == (resume, steps)


def test_a_folder_with_an_equals_sign_is_a_point_to_resume_from(tmp_path, monkeypatch):
    folder = tmp_path / "lr=1e-3"
    folder.mkdir()
    taken = []
    monkeypatch.setattr(training, "_train", lambda config, **how: taken.append(config) or 0)
    for point in (["--resume", str(folder)], [f"--resume={folder}"]):
        monkeypatch.setattr(sys, "argv", ["train.py", str(write_config(tmp_path)), *point])
        with pytest.raises(SystemExit):
            training.main()
    assert [config.checkpoint.resume_from for config in taken] == [str(folder)] * 2


@pytest.mark.parametrize(("command", "entry"), ENTRIES, ids=["glm-train", "train.py"])
def test_files_are_laid_over_each_other_in_the_order_of_the_command_line(command, entry, tmp_path, monkeypatch):
    """Whichever of them stand behind --config."""
    base, over = str(write_config(tmp_path)), str(tmp_path / "over.yaml")
    (tmp_path / "over.yaml").write_text("training: {max_steps: 9}\n")
    taken = []
    monkeypatch.setattr(training, "_train", lambda config, **how: taken.append(config) or 0)
    for first, second in ((base, over), (over, base)):
        for words in ([first, "--config", second], ["--config", first, second], [first, f"--config={second}"]):
            monkeypatch.setattr(sys, "argv", [*command, *words])
            with pytest.raises(SystemExit):
                entry()
    assert [config.training.max_steps for config in taken] == [9, 9, 9, 2, 2, 2]
