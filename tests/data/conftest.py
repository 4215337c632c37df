"""A small dataset of numbered images, to be spoiled by each test in its own way."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glm_training.data import Example, ScanReport, load_examples, scan_dataset
from glm_training.data.prompts_layout.listing import Mode


def paint(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """A noise image of its own for every seed; ``size`` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@dataclass
class Files:
    """A dataset folder with ``prompts.txt``, ``target_images`` and ``source_images``."""

    root: Path
    count: int

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.txt"

    @property
    def targets(self) -> Path:
        return self.root / "target_images"

    @property
    def sources(self) -> Path:
        return self.root / "source_images"

    def scan(self, mode: Mode = "t2i", **changes: object) -> ScanReport:
        return scan_dataset(mode, **self._arguments(mode, changes))  # type: ignore[arg-type]

    def load(self, mode: Mode = "t2i", **changes: object) -> list[Example]:
        return load_examples(mode, **self._arguments(mode, changes))  # type: ignore[arg-type]

    def _arguments(self, mode: Mode, changes: dict[str, object]) -> dict[str, object]:
        sources = self.sources if mode == "i2i" else None
        defaults: dict[str, object] = {
            "prompts_file": self.prompts, "target_images_dir": self.targets, "source_images_dir": sources,
            "height": 32, "width": 64,
        }  # fmt: skip
        return defaults | changes


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Four prompts, ``"a thing 0"`` to ``"a thing 3"``, each with a target and a source."""
    made = Files(tmp_path / "set", 4)
    for index in range(made.count):
        paint(made.targets / f"{index}.png", index)
        paint(made.sources / f"{index}.png", 100 + index)
    made.prompts.write_text("".join(f"a thing {index}\n" for index in range(made.count)), encoding="utf-8")
    return made
