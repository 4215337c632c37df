"""The tiny model's world, whose scripts import each other by their bare names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/tiny_glm_image"))
from checker import parse  # noqa: E402
from world import Jitter, Scene, draw  # noqa: E402

__all__ = ["Jitter", "Scene", "draw", "parse"]
