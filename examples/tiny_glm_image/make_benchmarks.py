"""Writes data/benchmarks: prompts of the small world as GenEval and DPG-Bench have theirs, none of them of data/t2i.

python examples/tiny_glm_image/make_benchmarks.py
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any

from world import COLORS, COUNTS, RELATIONS, SHAPES, Scene

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "benchmarks"
PROMPTS_PER_TAG = 8


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    chosen = random.Random(0)
    taken = {line for name in ("", "held_out/") for line in (DATA / f"t2i/{name}prompts.txt").read_text().splitlines()}
    records: list[dict[str, Any]] = []
    for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
        while sum(record["tag"] == tag for record in records) < PROMPTS_PER_TAG:
            record = _record(tag, chosen)
            if record["prompt"] not in taken:
                taken.add(record["prompt"])
                records.append(record)
    (FOLDER / "dpg_tiny/prompts").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (FOLDER / "geneval_tiny.jsonl").write_text(lines, encoding="utf-8")
    _write_questions([record["prompt"] for record in records if record["tag"] in ("counting", "position", "colors")])


def _write_questions(prompts: list[str]) -> None:
    """DPG-Bench's files for `prompts`: a text each, and a tree of questions in a CSV."""
    from checker import parse

    with (FOLDER / "dpg_tiny/questions.csv").open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"])
        for number, prompt in enumerate(prompts):
            (FOLDER / f"dpg_tiny/prompts/tiny{number:02d}.txt").write_text(prompt + "\n", encoding="utf-8")
            for place, (parents, named, question) in enumerate(_questions(parse(prompt)), start=1):
                lines.writerow([f"tiny{number:02d}", place, parents, named, question])


def _questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Dependency, tuple and question of each."""
    shapes = [(scene.color, scene.shape)] + ([(scene.other_color, scene.other_shape)] if scene.relation else [])
    found = []
    for color, shape in shapes:
        whole = str(len(found) + 1)
        found.append(("0", f"entity - whole ({shape})", f"Is there a {shape}?"))
        verb, plural = ("Are", "s") if scene.count > 1 else ("Is", "")
        asked = f"{verb} the {shape}{plural} {color}?"
        found.append((whole, f"attribute - color ({shape}, {color})", asked))
    if scene.count > 1:
        asked = f"Are there exactly {COUNTS[scene.count]} {scene.shape}s?"
        found.append(("1", f"other - count ({scene.shape}, =={scene.count})", asked))
    if scene.relation:
        asked = f"Is the {scene.shape} {scene.relation} the {scene.other_shape}?"
        named = f"relation - spatial ({scene.shape}, {scene.other_shape}, {scene.relation})"
        found.append(("1,3", named, asked))
    return found


def _record(tag: str, chosen: random.Random) -> dict[str, Any]:
    """A random prompt of a tag. The world names a colour with every shape and a place with every pair; a tag asks for
    its own part of that alone."""
    color, other_color = chosen.sample(list(COLORS), 2)
    shape, other_shape = chosen.sample(SHAPES, 2)
    relation = chosen.choice(RELATIONS)
    if tag in ("single_object", "colors"):
        asked = {"class": shape, "count": 1} | ({"color": color} if tag == "colors" else {})
        return {"tag": tag, "include": [asked], "prompt": Scene(color, shape).prompt()}
    if tag == "counting":
        count = chosen.choice([number for number in COUNTS if number > 1])
        limits = {"include": [{"class": shape, "count": count}], "exclude": [{"class": shape, "count": count + 1}]}
        return {"tag": tag, **limits, "prompt": Scene(color, shape, count).prompt()}
    first: dict[str, Any] = {"class": other_shape, "count": 1}
    second: dict[str, Any] = {"class": shape, "count": 1}
    if tag == "color_attr":
        first["color"], second["color"] = other_color, color
    if tag == "position":
        second["position"] = [relation, 0]
    prompt = Scene(color, shape, 1, relation, other_color, other_shape).prompt()
    return {"tag": tag, "include": [first, second], "prompt": prompt}


if __name__ == "__main__":
    main()
