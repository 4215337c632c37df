"""Prompts of a file, plans and renders, what is recorded, and a second run into the same folder."""

from __future__ import annotations

import csv
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from glm_training.cli.main import main
from glm_training.data import DataError
from glm_training.data.prompts_to_draw import prompts_to_draw
from glm_training.evaluation.suites.drawn_samples import read_samples
from glm_training.models.glm_image.family import GLMImage


def shade(prompt: str, seed: int, index: int, plan: int, render: int) -> float:
    """Of the picture that the stub below draws: another one for each."""
    return ((len(prompt) * 97 + seed * 53 + index * 29 + plan * 11 + render * 5) % 251) / 255


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """Calls of a stub for the model's drawing, whose pictures are grey as `shade` says."""
    made: list[dict] = []

    def draw(self, prompts, *, samples, seed, prompt_ids, height, width, renders=1, sources=None, **rest):
        made.append({"prompts": list(prompts), "sources": sources, "samples": samples, "renders": renders})
        greys = [
            shade(prompt, seed, index, plan, render)
            for prompt, index in zip(prompts, prompt_ids, strict=True)
            for plan in range(samples)
            for render in range(renders)
        ]
        return torch.tensor(greys)[:, None, None, None].expand(-1, 3, height, width)

    monkeypatch.setattr(GLMImage, "draw", draw)
    return made


@pytest.fixture
def sampled(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Exit status, and what was said, of the command on the tiny random model at 32 px."""

    def run(*words: object) -> tuple[int, str]:
        fixed = ["glm-train", "sample", "--model", "tiny-random", "--height", "32", "--width", "32"]
        monkeypatch.setattr("sys.argv", [*fixed, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out + told.err

    return run


def greys(folder: Path) -> dict[str, int]:
    return {path.name: Image.open(path).getpixel((0, 0))[0] for path in folder.glob("[0-9]*.png")}


def test_every_picture_is_drawn_named_and_recorded(tmp_path, calls, sampled):
    """Three prompts of two plans and three renders: six at a time, as 8 are at most."""
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\nan owl at night\n")
    out = tmp_path / "out"
    words = ["--prompts", tmp_path / "prompts.txt", "--plans", 2, "--renders", 3, "--seed", 4, "--out", out]
    code, told = sampled(*words)
    assert code == 0 and f"18 pictures in {out}: 0-0-0.png to 2-1-2.png" in told
    prompts = ["a cat", "a red dog", "an owl at night"]
    expected = {
        f"{i}-{n}-{m}.png": round(shade(prompt, 4, i, n, m) * 255)
        for i, prompt in enumerate(prompts)
        for n in range(2)
        for m in range(3)
    }
    assert greys(out) == expected
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == list(expected)
    assert [(r["prompt"], r["plan"], r["render"], r["index"]) for r in records][7] == ("a red dog", 0, 1, 1)
    settings = {
        key: records[0][key] for key in ("seed", "model", "family", "lora", "height", "width", "source", "dtype")
    }
    assert settings == {"seed": 4, "model": "tiny-random", "family": "glm_image", "lora": [], "height": 32, "width": 32,
                        "source": None, "dtype": "float32"}  # fmt: skip
    assert records[0]["num_inference_steps"] == 50 and records[0]["guidance_scale"] == 1.5
    assert [call["prompts"] for call in calls] == [[prompt] for prompt in prompts]
    assert not (out / "run.lock").exists()


def test_a_second_run_draws_what_is_missing_and_nothing_else(tmp_path, calls, sampled):
    out = tmp_path / "out"
    words = ["--prompt", "a cat", "--prompt", "a dog", "--samples", 2, "--out", out]
    sampled(*words)
    whole = {path.name: path.read_bytes() for path in out.glob("[0-9]*.png")}
    records = (out / "samples.jsonl").read_bytes()
    calls.clear()
    code, told = sampled(*words)
    assert code == 0 and calls == [] and "of which 4 were there" in told
    (out / "1-0.png").unlink()
    (out / "0-1.png").write_bytes(whole["0-1.png"][:40])
    touched = (out / "0-0.png").stat().st_mtime_ns
    code, told = sampled(*words)
    assert code == 0 and len(calls) == 1 and "of which 2 were there" in told
    assert {path.name: path.read_bytes() for path in out.glob("[0-9]*.png")} == whole
    assert (out / "0-0.png").stat().st_mtime_ns == touched and (out / "samples.jsonl").read_bytes() == records
    # more samples of the same prompts go on under the same numbers
    code, _ = sampled(*words[:5], 3, *words[6:])
    assert {name: grey for name, grey in greys(out).items() if name.endswith("-2.png")} == {
        f"{i}-2.png": round(shade(prompt, 0, i, 2, 0) * 255) for i, prompt in enumerate(("a cat", "a dog"))
    }
    assert {name: (out / name).read_bytes() for name in whole} == whole


@pytest.mark.parametrize("other", [["--seed", 1], ["--steps", 3], ["--width", 64], ["--guidance", 2], ["--renders", 2]])
def test_other_settings_take_the_next_numbers(tmp_path, calls, sampled, other):
    out = tmp_path / "out"
    words = ["--prompt", "a cat", "--out", out]
    sampled(*words)
    first = (out / "0-0.png").read_bytes()
    (out / "4-mine.txt").write_text("mine")
    code, told = sampled(*words, *other)
    assert code == 0 and "in" in told and (out / "0-0.png").read_bytes() == first
    assert {path.name.split("-")[0] for path in out.glob("[0-9]*.png")} == {"0", "5"}
    assert len(read_samples(out)) == len(greys(out))


def test_what_a_kill_tore_is_mended_and_what_it_left_stays(tmp_path, calls, sampled):
    out = tmp_path / "out"
    words = ["--prompt", "a cat", "--prompt", "a dog", "--out", out]
    sampled(*words)
    lines = (out / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (out / "samples.jsonl").write_bytes(lines[0] + lines[1][:30])
    code, _ = sampled(*words)
    assert code == 0 and [record["file"] for record in read_samples(out)] == ["0-0.png", "2-0.png"]
    assert greys(out)["1-0.png"] == greys(out)["2-0.png"], "1-0.png is nobody's by now, and stays"
    (out / "samples.jsonl").write_text("not json\n" + lines[0].decode())
    code, told = sampled(*words)
    assert code == 2 and "samples.jsonl:1: is no record of a picture" in told


def test_a_last_record_without_the_end_of_its_line_stays(tmp_path, calls, sampled):
    """As some editors leave a file."""
    out = tmp_path / "out"
    sampled("--prompt", "a cat", "--out", out)
    (out / "samples.jsonl").write_bytes((out / "samples.jsonl").read_bytes().rstrip(b"\n"))
    sampled("--prompt", "a dog", "--out", out)
    assert [(each["file"], each["prompt"]) for each in read_samples(out)] == [
        ("0-0.png", "a cat"),
        ("1-0.png", "a dog"),
    ]


def test_a_picture_to_edit_whose_name_is_no_text(tmp_path, calls, sampled):
    source = picture(tmp_path / os.fsdecode(b"caf\xe9.png"))
    code, told = sampled("--prompt", "a cat", "--image", source, "--out", tmp_path / "out")
    assert code == 0, told
    assert [each["source"] for each in read_samples(tmp_path / "out")] == [str(source)]


# -- prompts of a file -------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_opened_is_named(tmp_path, calls, sampled):
    place = tmp_path / "out" / "samples.jsonl"
    place.mkdir(parents=True)
    code, told = sampled("--prompt", "a cat", "--out", tmp_path / "out")
    assert code == 1 and told.splitlines()[-1] == f"error: {place}: Is a directory"


def test_a_disk_that_takes_no_more_names_the_folder(tmp_path, calls, sampled):
    """A write that fails knows no file: a limit on their size stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        code, told = sampled("--prompt", "a cat", "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(calls) == 1  # it came as far as the record
    assert code == 1 and told.splitlines()[-1] == f"error: --out: {tmp_path / 'out'}: File too large"
    assert sampled("--prompt", "a cat", "--out", tmp_path / "out")[0] == 0
    assert len(greys(tmp_path / "out")) == 1


def picture(path: Path, grey: int = 9) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), grey, np.uint8)).save(path)
    return path


def table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("layout", ["lines", "jsonl", "json", "list", "csv", "folder"])
def test_all_layouts_give_the_same_prompts(tmp_path, layout):
    prompts = ["a cat", 'a sign that says "A, B"', "[x] and {y}"]
    path = tmp_path / {"jsonl": "x.jsonl", "json": "x.json", "list": "y.json", "csv": "x.csv"}.get(layout, "x.txt")
    if layout == "lines":
        path.write_text("\n".join(prompts) + "\n\n")
    elif layout == "csv":
        table(path, [{"id": str(i), "Prompt": prompt} for i, prompt in enumerate(prompts)])
    elif layout == "list":
        path.write_text(json.dumps(prompts))
    elif layout == "json":
        path.write_text(json.dumps([{"caption": prompt, "tag": "x"} for prompt in prompts]))
    else:
        path = tmp_path / "metadata.jsonl" if layout == "folder" else path
        path.write_text("".join(json.dumps({"tag": "counting", "prompt": prompt}) + "\n" for prompt in prompts))
    found = prompts_to_draw(tmp_path if layout == "folder" else path)
    assert [(each.index, each.prompt, each.source) for each in found] == [(i, p, None) for i, p in enumerate(prompts)]


def test_all_that_is_wrong_is_told_with_its_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"tag": 1}\nnope\n{"prompt": "b", "source": "gone.png"}\n')
    with pytest.raises(DataError) as told:
        prompts_to_draw(path)
    problems = {(problem.line, problem.reason.split(":")[0].split(" ")[0]) for problem in told.value.problems}
    assert {line for line, _ in problems} == {2, 3, 4, 5}
    picture(tmp_path / "there.png")
    path.write_text('{"prompt": "a", "source": "there.png"}\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match="1 of 2 records name a picture to edit"):
        prompts_to_draw(path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no prompt"):
        prompts_to_draw(tmp_path / "empty.txt")
    table(tmp_path / "x.csv", [{"id": "1", "name": "x"}])
    with pytest.raises(DataError):
        prompts_to_draw(tmp_path / "x.csv")


def test_pictures_to_edit_come_from_records_options_and_folders(tmp_path, calls, sampled):
    for index, grey in enumerate((40, 80)):
        picture(tmp_path / "sources" / f"{index}.png", grey)
    records = tmp_path / "edits.jsonl"
    records.write_text(
        "".join(json.dumps({"prompt": p, "source": f"sources/{i}.png"}) + "\n" for i, p in enumerate("ab"))
    )
    (tmp_path / "edits.txt").write_text("a\nb\n")
    out = ["--out", tmp_path / "out"]
    both = [word for name in ("0.png", "1.png") for word in ("--image", tmp_path / "sources" / name)]
    for words in (["--prompts", records], ["--prompts", tmp_path / "edits.txt", *both],
                  ["--prompts", tmp_path / "edits.txt", "--image", tmp_path / "sources"]):  # fmt: skip
        calls.clear()
        code, told = sampled(*words, *out)
        assert code == 0, told
        if calls:  # the first time: afterwards they are known to be the same pictures
            assert [round(float(x) * 255) for x in calls[0]["sources"][:, 0, 0, 0]] == [40, 80]
    assert len(greys(tmp_path / "out")) == 2
    code, _ = sampled("--prompt", "a", "--prompt", "b", "--image", tmp_path / "sources" / "1.png", *out)
    assert code == 0 and [round(float(x) * 255) for x in calls[-1]["sources"][:, 0, 0, 0]] == [80, 80]
    for words, named in (
        (["--prompts", records, "--image", tmp_path / "sources"], "name pictures to edit already"),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c", *both], "--image is given 2 times for 3 prompts"),
        (["--prompt", "a", "--prompt", "b", "--prompt", "c", "--image", tmp_path / "sources"], "no picture of index 2"),
    ):
        code, told = sampled(*words, *out)
        assert code == 2 and named in told
    empty = [tmp_path / f"empty{number}.png" for number in range(2)]
    for each in empty:
        each.touch()
    code, told = sampled("--prompt", "a", "--prompt", "b", "--image", empty[0], "--image", empty[1], *out)
    assert code == 2 and all(f"{each}: is an empty file" in told for each in empty)


def test_options_of_another_family_are_refused(tmp_path, calls, sampled):
    code, told = sampled("--prompt", "a", "--samples", 2, "--plans", 2, "--out", tmp_path / "out")
    assert code == 2 and "are the same of a GLM-Image" in told
    code, told = sampled("--prompt", "a", "--prompts", "x", "--out", tmp_path / "out")
    assert code == 2 and "not allowed with argument" in told


# -- overviews ---------------------------------------------------------------------------------------------------------


def sheets(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: Image.open(path).size for path in sorted(folder.glob("grid*.png"))}


def test_a_single_picture_has_no_overview(tmp_path, calls, sampled):
    sampled("--prompt", "a", "--out", tmp_path / "out")
    assert sheets(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("prompts", "words", "names"),
    [
        (2, [], ["grid-0-1.png"]),
        (200, [], ["grid-0-59.png", "grid-60-119.png", "grid-120-179.png", "grid-180-199.png"]),
        (1, ["--samples", 100], ["grid-0.png"]),
        (30, ["--plans", 2, "--renders", 2], ["grid-0-19.png", "grid-20-29.png"]),
        (3, ["--plans", 4, "--renders", 4], ["grid-0-2.png"]),
    ],
)
def test_overviews_can_be_looked_at(tmp_path, calls, sampled, prompts, words, names):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i} {'word ' * 200}\n" for i in range(prompts)))
    code, told = sampled("--prompts", tmp_path / "p.txt", *words, "--out", tmp_path / "out")
    found = sheets(tmp_path / "out")
    assert code == 0 and set(found) == set(names) and f"all of them: {', '.join(names)}" in told
    assert all(width <= 3400 and height <= 7900 for width, height in found.values()), found


# -- as pictures of a benchmark ----------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["glm-train", "evaluate", "--suite", "geneval", "--detector", "shapes",
                                         *map(str, words)])  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out + told.err

    return run


def test_a_benchmark_judges_what_was_sampled(tmp_path, calls, sampled, evaluated):
    benchmark = Path(__file__).parents[2] / "data/benchmarks/geneval_tiny.jsonl"
    lines = benchmark.read_text().splitlines()[:3]
    prompts = tmp_path / "three.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    samples, out = tmp_path / "samples", tmp_path / "geneval"
    sampled("--prompts", prompts, "--samples", 2, "--out", samples)
    words = ["--prompts", prompts, "--images", samples, "--out", out]
    code, told = evaluated(*words)
    assert code == 0, told
    for index, line in enumerate(lines):
        for sample in range(2):
            drawn = Image.open(out / f"{index:05d}/samples/{sample:04d}.png").getpixel((0, 0))[0]
            assert drawn == round(shade(json.loads(line)["prompt"], 0, index, sample, 0) * 255)
    results = json.loads((out / "results.json").read_text())
    assert json.dumps(results).count("tiny-random") == 1, "the model stands beside the figures"
    whole = (samples / "1-1.png").read_bytes()
    for name in ("0-1.png", "1-1.png"):
        (samples / name).write_bytes(whole[:60])
    code, told = evaluated(*words[:-1], tmp_path / "broken")
    assert code == 2 and f"{samples}: 0-1.png, 1-1.png cannot be read: delete 2 files and run glm-train sample" in told
    (samples / "0-1.png").write_bytes(whole)
    (samples / "1-1.png").unlink()
    for more in ([], ["--samples", 2]):  # what is listed and gone is not passed over
        code, told = evaluated(*words[:-1], tmp_path / "other", *more)
        assert code == 2 and told.count("has 1 picture, wanted 2") == 1 and "Run glm-train sample again" in told
    assert evaluated(*words[:-1], tmp_path / "one", "--samples", 1)[0] == 0
    sampled("--prompts", prompts, "--samples", 2, "--steps", 3, "--out", samples)
    code, told = evaluated(*words[:-1], tmp_path / "other")
    assert code == 2 and "were not made alike (num_inference_steps differ)" in told
