"""Writes data/benchmarks: prompts of the small world in GenEval's format, and others to train on.

    python examples/tiny_glm_image/make_benchmarks.py

Nothing is drawn or trained.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from world import COLORS, COUNTS, RELATIONS, SHAPES, Scene, all_scenes

DATA = Path(__file__).parents[2] / "data"
FOLDER = DATA / "benchmarks"
PROMPTS_PER_TAG = 8
TRAINING = {"relation": 40, "count": 12, "single": 2}
"""Prompts to train on, by kind of scene."""


def main() -> None:
    chosen = random.Random(0)
    records: list[dict[str, Any]] = []
    taken = {line for name in ("", "held_out/") for line in (DATA / f"t2i/{name}prompts.txt").read_text().splitlines()}
    for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
        while sum(record["tag"] == tag for record in records) < PROMPTS_PER_TAG:
            record = _record(tag, chosen)
            if record["prompt"] not in taken:
                taken.add(record["prompt"])
                records.append(record)
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (FOLDER / "geneval_tiny.jsonl").write_text(lines, encoding="utf-8")
    training = []
    for kind, count in TRAINING.items():
        prompts = [scene.prompt() for scene in all_scenes(False)[kind]]
        training += chosen.sample([prompt for prompt in prompts if prompt not in taken], count)
    chosen.shuffle(training)
    (FOLDER / "geneval_tiny_training.txt").write_text("\n".join(training) + "\n", encoding="utf-8")


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
