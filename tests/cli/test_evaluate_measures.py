"""`glm-train evaluate` of text and of reconstructions: real pictures of the tiny model, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from glm_training.cli.main import main

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "data/benchmarks/text_tiny.jsonl"
ORIGINALS = ROOT / "data/t2i/held_out/target_images"
PIXELS_ALONE = ["--no-rfid", "--no-lpips"]


def evaluate(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["glm-train", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    told = capsys.readouterr()
    return int(exit_.value.code or 0), told.out, told.err


def figures(out: Path) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in json.loads((out / "results.json").read_text())["figures"]}


def test_pictures_of_sample_are_copied_and_none_is_drawn(tmp_path, monkeypatch, capsys):
    prompts, images = tmp_path / "prompts.jsonl", tmp_path / "moved here"
    prompts.write_text(PROMPTS.read_text().splitlines()[0] + "\n")
    images.mkdir()
    drawn = Image.new("RGB", (32, 32), "navy")
    drawn.save(images / "0-0.png")
    record = {"file": "0-0.png", "prompt": json.loads(prompts.read_text())["prompt"], "group": "a"}
    (images / "samples.jsonl").write_text(json.dumps(record) + "\n")
    words = [
        "--suite",
        "text",
        "--prompts",
        prompts,
        "--images",
        images,
        "--out",
        tmp_path / "out",
        "--stage",
        "generate",
    ]
    code, told, err = evaluate(monkeypatch, capsys, *words)
    assert code == 0 and err == "" and "copying 1 picture" in told and "drawing" not in told
    with Image.open(tmp_path / "out" / "0.png") as copied:
        assert copied.tobytes() == drawn.tobytes()


def test_the_tiny_model_writes_signs_and_they_are_read(tmp_path, monkeypatch, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(PROMPTS.read_text().splitlines()[:3]) + "\n")
    out = tmp_path / "out"
    words = ["--suite", "text", "--prompts", prompts, "--steps", "5", "--guidance", "1", "--out", out]
    code, told, err = evaluate(monkeypatch, capsys, *words)
    assert code == 0 and err == "" and "drawing 3 pictures" in told and "judging 3 pictures (rapidocr)" in told, err
    assert all(len(line) <= 80 for line in told.splitlines()[:-1])
    assert [(path.name, path.is_file()) for path in (out / f"{n}.png" for n in range(3))] == [
        (f"{n}.png", True) for n in range(3)
    ]
    # the first three words of the world, which it draws right nine times of ten; all wrong would be a fault of ours
    assert figures(out)["text score (en)"] > 0


def test_the_tiny_models_vae_gives_pictures_back(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["--suite", "reconstruction", "--originals", ORIGINALS, "--first", 3, "--size", 128, "--compare-at", 64]
    code, told, err = evaluate(monkeypatch, capsys, *words, *PIXELS_ALONE, "--out", out)
    assert code == 0 and err == "", err
    assert "reconstruction, judged by pixels at 64 px" in told
    found = figures(out)
    assert 25 < found["PSNR (dB)"] < 60 and 0.8 < found["SSIM"] < found["SSIM, published reading"] < 1
    code, _, err = evaluate(monkeypatch, capsys, *words[:-1], 32, *PIXELS_ALONE, "--out", out)
    assert code == 2 and "compared: 64 there, 32 now" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "text"], "--suite text needs --prompts. CVTG-2K's are"),
        (["--suite", "text", "--prompts", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--suite", "text", "--prompts", PROMPTS, "--reader", "easyocr"], "--reader easyocr: write rapidocr"),
        (["--suite", "text", "--prompts", PROMPTS, "--reader", "openai:m@host"], "--reader: an address is http"),
        (["--suite", "reconstruction"], "needs --originals"),
        (["--suite", "reconstruction", "--originals", "none"], "there is no such file or folder"),
        (
            ["--suite", "reconstruction", "--originals", ORIGINALS, "--no-rfid", "--alexnet", "none.pth"],
            "give --alexnet",
        ),
    ],
)
def test_what_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    code, _, err = evaluate(monkeypatch, capsys, *words, "--out", "out")
    assert code == 2 and said in err and "Traceback" not in err
    assert not list(tmp_path.rglob("*.png"))
