"""`glm-train sample`: what it refuses, in its own words, and that it writes over nothing."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from glm_training.cli import drawing_model as sampling
from glm_training.cli.main import main
from glm_training.models.glm_image.family import GLMImage


def sample(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["glm-train", "sample", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    told = capsys.readouterr()
    return int(exit_.value.code), told.out, told.err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", "0", "a whole number from 1 to 1000"),
        ("--steps", "-3", "a whole number from 1 to 1000"),
        ("--steps", "2.5", "a whole number from 1 to 1000"),
        ("--samples", "0", "a whole number from 1"),
        ("--height", "0", "a whole number from 8"),
        ("--width", "1e9", "a whole number from 8"),
        ("--seed", "-1", "a whole number from 0"),
        ("--seed", str(2**70), "a whole number from 0"),
        ("--guidance", "nan", "a number from 1"),
        ("--guidance", "0.5", "a number from 1"),
        ("--temperature", "0", "a number from 0.01 to 100"),
        ("--temperature", "1e-300", "a number from 0.01"),
        ("--temperature", "inf", "a number from 0.01"),
        ("--top-p", "1.5", "a number from 1e-06 to 1"),
        ("--top-p", "1e-40", "a number from 1e-06 to 1"),
        ("--prompt", " ", "it is empty"),
        ("--out", "", "it is empty"),
        ("--source", "", "it is empty"),
        ("--model", "x" * 256, "no file system takes a name of over 255 bytes"),
        ("--lora", "dit=" + "y/" * 2500, "or a path of over 4095"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_loaded(monkeypatch, capsys, option, value, expected):
    code, _, err = sample(monkeypatch, capsys, "--prompt", "a cat", "--model", "no/where/at-all", f"{option}={value}")
    assert code == 2 and f"{option}: " in err and expected in err


def test_the_bounds_themselves_are_allowed():
    from glm_training.cli.arguments import number, whole_number

    assert [whole_number(1, 1000)(text) for text in ("1", "1000")] == [1, 1000]
    assert number(1e-6, 1)("1e-6") == 1e-6 and number(1, 9)("1") == 1.0


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "no/where/at-all"],
        ["--model", "nobody/nothing"],
        ["--model", "nobody/nothing", "--family", "sdxl"],
        ["--model", "not a name"],
        ["--model", "{folder}"],
        ["--model", "{folder}", "--family", "sdxl"],
        ["--model", "{file}", "--family", "sdxl"],
        ["--model", "tiny-random", "--lora", "ar={folder}"],
        ["--model", "tiny-random", "--source", "{folder}/none.png"],
        ["--model", "tiny-random", "--height", "40"],
        ["--model", "tiny-random", "--prompt", "a cat <|image|>"],
        ["--model", "tiny-random", "--out", "{file}/below"],
        ["--model", "tiny-random", "--prompt", "a cat", "--prompt", "a \udcff cat"],
        ["--model", "tiny-random", "--prompt", "a \x1b[31mcat"],
        ["--model", "tiny-random", "--prompt", "\u200b"],
        ["--model", "tiny-random", "--prompt", '""'],
    ],
)
def test_errors_speak_of_options_and_of_no_keys(monkeypatch, capsys, tmp_path, words):
    (tmp_path / "file.safetensors").write_bytes(b"x")
    places = {"folder": str(tmp_path), "file": str(tmp_path / "file.safetensors")}
    words = [word.format(**places) for word in words]
    if "--prompt" not in words:
        words += ["--prompt", "a cat"]
    if "--out" not in words:
        words += ["--out", f"{tmp_path}/out"]
    code, out, err = sample(monkeypatch, capsys, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and "Traceback" not in err, err
    told = err.replace("adapter_model.safetensors", "")
    assert not re.search(r"\b(model|data|training|reward|logging)\.[a-z_]+\b", told), err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn: pictures whose grey is their place in the call, over 10."""

    def draw(self, prompts, *, samples, height, width, **options):
        count = len(prompts) * samples
        return (torch.arange(count) / 10)[:, None, None, None].expand(count, 3, height, width)

    monkeypatch.setattr(GLMImage, "draw", draw)


def test_pictures_go_on_after_those_that_are_there(monkeypatch, capsys, tmp_path, drawn):
    words = ["--model", "tiny-random", "--prompt", "a", "--prompt", "b", "--samples", "2", "--height", "32"]
    out = tmp_path / "new/folder"
    _, first, _ = sample(monkeypatch, capsys, *words, "--out", str(out))
    assert f"4 pictures in {out}: 0-0.png to 1-1.png" in first
    before = {path.name: path.read_bytes() for path in out.glob("[0-9]*")}
    assert sorted(before) == ["0-0.png", "0-1.png", "1-0.png", "1-1.png"]
    (out / "7-0.jpg").write_bytes(b"mine")
    code, second, _ = sample(monkeypatch, capsys, *words, "--seed", "1", "--out", str(out))
    assert code == 0 and "4 pictures" in second and "8-0.png to 9-1.png" in second
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "9-1.png").read_bytes() == before["1-1.png"] != before["0-0.png"]


def test_a_prompt_that_is_cut_is_told(monkeypatch, capsys, tmp_path, drawn):
    words = ["--model", "tiny-random", "--prompt", f'a sign "{"y" * 3000}"', "--height", "32", "--out", str(tmp_path)]
    code, out, _ = sample(monkeypatch, capsys, *words)
    assert code == 0 and "note: the model does not read all of --prompt 'a sign \"yyy" in out and "of which 2047" in out


def test_every_key_that_a_loader_names_has_an_option_here():
    for key in ("model.name", "model.family (--family of sample)", "model.local_files_only: true", "model.taesd"):
        assert "model." not in sampling.in_words_of_sample(f"correct {key} there")
