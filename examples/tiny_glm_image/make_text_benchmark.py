"""Writes data/benchmarks/text_tiny.jsonl: signs of the small world in LongText-Bench's format.

    python examples/tiny_glm_image/make_text_benchmark.py
    python examples/tiny_glm_image/make_text_benchmark.py --draw runs/perfect_signs

The second one draws them too, as the world itself does: what a reader makes of perfect pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from world import SIGN_COLORS, UNSEEN_WORDS, Jitter, Scene, all_scenes, draw

FILE = Path(__file__).parents[2] / "data/benchmarks/text_tiny.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="where perfect pictures go (none are drawn)")
    folder = parser.parse_args().draw
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
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(scene for scenes in signs.values() for scene in scenes):
            draw(scene, Jitter(0, 0)).save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
