"""Writes data/benchmarks/text_tiny.jsonl: signs of the small world in LongText-Bench's format.

python examples/tiny_glm_image/make_text_benchmark.py
"""

from __future__ import annotations

import json
from pathlib import Path

from world import SIGN_COLORS, UNSEEN_WORDS, Scene, all_scenes

FILE = Path(__file__).parents[2] / "data/benchmarks/text_tiny.jsonl"


def main() -> None:
    signs = {
        "known word, new colour": all_scenes(True)["sign"],
        "word never seen": [Scene(color, word=word) for word in UNSEEN_WORDS for color in SIGN_COLORS],
    }
    records = [
        {"category": category, "prompt": scene.prompt(), "text": [scene.word]}
        for category, scenes in signs.items()
        for scene in scenes
    ]
    lines = [json.dumps({"prompt_id": number, **record}) + "\n" for number, record in enumerate(records)]
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
