"""OCR of rendered words: accuracy and time of the text-accuracy reader against RapidOCR's own call, as JSON.

    python benchmarks/ocr.py [--images 64] [--large 8]

Each image shows one word on a coloured sign, drawn with Pillow's default font at 20 to 28 px per 128. Accuracy is the
share of images read exactly up to case. Seconds are wall time; CPU seconds, over all threads, compare on a busy machine
too. ``settings`` varies one choice of the reader at a time, at 128 px.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from rapidocr import RapidOCR

from glm_training.rewards import TextAccuracyOptions, ocr, read_texts

WORDS = (
    "OPEN CAFE STOP SALE EXIT PIZZA HELLO BOOKS TAXI MILK BREAD HOTEL MUSIC PARK SHOP FISH TEA ZOO BANK JAZZ "
    "open cafe Hello Pizza BAKERY WELCOME 24 GO"
).split()
COLOURS = ("white", "yellow", "red", "green", "blue", "black", "orange", "purple", "gray")
Read = Callable[[torch.Tensor], list[list[str]]]


def luminance(colour: str) -> float:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def draw(word: str, side: int, rng: random.Random) -> torch.Tensor:
    """[3, side, side]: ``word`` on a sign of a contrasting colour, somewhere in a plain picture."""
    unit, size = side / 128, rng.choice((20, 22, 24, 26, 28))
    wall, sign = rng.choice(COLOURS), rng.choice(COLOURS)
    ink = rng.choice([colour for colour in COLOURS if abs(luminance(colour) - luminance(sign)) > 90])
    image = Image.new("RGB", (side, side), wall)
    pen = ImageDraw.Draw(image)
    while True:
        font = ImageFont.load_default(size=int(size * unit))
        left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
        if right - left <= side - 12 * unit:
            break
        size -= 2
    half_width, half_height = (right - left) / 2 + 6 * unit, (bottom - top) / 2 + 6 * unit
    x, y = rng.uniform(half_width, side - half_width), rng.uniform(half_height, side - half_height)
    pen.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=sign)
    pen.text((x - (left + right) / 2, y - (top + bottom) / 2), word, font=font, fill=ink)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def data_set(count: int, side: int) -> tuple[list[str], torch.Tensor]:
    rng = random.Random(side)
    words = [rng.choice(WORDS) for _ in range(count)]
    return words, torch.stack([draw(word, side, rng) for word in words])


def stock_reader() -> Read:
    """RapidOCR's own call at its own settings."""
    engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(images: torch.Tensor) -> list[list[str]]:
        pixels = (images * 255).byte().permute(0, 2, 3, 1).numpy()[..., ::-1]
        return [list(engine(np.ascontiguousarray(image)).txts or ()) for image in pixels]

    return read


def measure(read: Read, words: list[str], images: torch.Tensor) -> dict[str, float]:
    read(images[:2])  # load and warm up
    wall, processor = time.perf_counter(), time.process_time()
    readings = read(images)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    right = sum(" ".join(lines).lower() == word.lower() for lines, word in zip(readings, words, strict=True))
    return {
        "accuracy": round(right / len(words), 4),
        "seconds_per_image": round(wall / len(words), 4),
        "cpu_seconds_per_image": round(processor / len(words), 4),
    }


@contextmanager
def setting(name: str, value: object) -> Iterator[None]:
    """``ocr.<name>`` changed for one measurement."""
    before = vars(ocr)[name]
    vars(ocr)[name] = value
    try:
        yield
    finally:
        vars(ocr)[name] = before


def in_threads(workers: int) -> Read:
    """The reader on another number of threads."""
    reader = ocr.load_reader(TextAccuracyOptions())

    def read(images: torch.Tensor) -> list[list[str]]:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(reader.read, ocr.to_uint8(images)))

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="images of 128 px")
    parser.add_argument("--large", type=int, default=8, help="images of 1024 px")
    arguments = parser.parse_args()
    report: dict[str, object] = {"threads": torch.get_num_threads()}
    stock = stock_reader()
    for side, count in ((128, arguments.images), (1024, arguments.large)):
        words, images = data_set(count, side)
        ours, theirs = measure(read_texts, words, images), measure(stock, words, images)
        speedup = {
            f"speedup_{kind}": round(theirs[f"{kind}_per_image"] / ours[f"{kind}_per_image"], 1)
            for kind in ("seconds", "cpu_seconds")
        }
        report[f"{side}px"] = {"images": count, "ours": ours, "stock": theirs, **speedup}
    words, images = data_set(arguments.images, 128)
    settings: dict[str, dict[str, float]] = {}
    for least in (128, 160, 192, 256):
        with setting("DETECTOR_SIDES", (least, 640)):
            settings[f"detector side {least}"] = measure(read_texts, words, images)
    for step in (32, 64, 320):
        with setting("CROP_WIDTH_STEP", step):
            settings[f"crop width step {step}"] = measure(read_texts, words, images)
    for workers in (1, 2, 4):
        settings[f"threads {workers}"] = measure(in_threads(workers), words, images)
    report["settings"] = settings
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
