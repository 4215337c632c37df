"""Loads what the package imports of others, once for all that is forked from here (`tests/warm.py`, the runner of the
mutants). The package itself is let go again, so that each fork reads its own copy."""

import sys

import onnxruntime  # noqa: F401
import open_clip  # noqa: F401
import pytest  # noqa: F401
import rapidocr.main  # noqa: F401

import glm_training.cli.main
import glm_training.trainers.run  # noqa: F401

for name in [name for name in sys.modules if name.split(".")[0] == "glm_training"]:
    del sys.modules[name]
