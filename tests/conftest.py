"""One thread per test process: the suite itself runs on two (pytest -n 2), and small tensors gain nothing from more."""

from __future__ import annotations

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def level_of_logs() -> None:
    """Libraries that an earlier test loaded set the root's level, and tests count what is logged."""
    logging.getLogger().setLevel(logging.WARNING)
