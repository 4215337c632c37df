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
    """Libraries that an earlier test loaded set the root's level, a run sets the package's, and tests count records."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("glm_training").setLevel(logging.NOTSET)
