"""One thread per test process: the suite itself runs on two (pytest -n 2), and small tensors gain nothing from more."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest

SLOW = (
    "parity/test_training_equivalences.py",
    "e2e/test_documents.py",
    "export/test_families.py",
    "trainers/test_killed_anywhere.py",
    "parity/test_arms.py",
    "parity/test_sharded.py",
    "e2e/test_killed_workers.py",
    "trainers/test_dmdr_trainer.py",
    "parity/test_preference_equivalences.py",
    "doctor/test_doctor.py",
    "e2e/test_newcomer.py",
    "export/test_command.py",
    "e2e/test_cli.py",
    "doctor/test_disk.py",
    "checkpoint/test_fault_sweep.py",
    "trainers/test_dpo_trainer.py",
    "parity/test_sharded_failures.py",
    "parity/test_dmdr_processes.py",
    "planning/test_peaks.py",
    "trainers/test_best_checkpoint.py",
    "e2e/test_two_nodes.py",
    "e2e/test_remote_reward.py",
    "trainers/test_residency.py",
    "methods/test_distillation.py",
    "tests/test_quality.py",
)
"""Files of half a minute or more; they come first, so that two processes end at the same time."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def one_thread() -> None:
    """OpenMP's pool does not live on in a fork: where the suite runs on two threads, its forks would wait for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_thread)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(SLOW) if item.path.as_posix().endswith(name)), len(SLOW))

    items.sort(key=place)


@pytest.fixture(autouse=True)
def level_of_logs() -> None:
    """Libraries that an earlier test loaded set the root's level, a run sets the package's, and tests count records."""
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("glm_training").setLevel(logging.NOTSET)


@pytest.fixture
def heeds_hangups() -> Iterator[None]:
    """The suite, and the programs that it starts, may run under `nohup`, which has them ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
