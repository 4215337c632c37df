from pathlib import Path

import pytest

from glm_training.export import verify
from tests import runs, warm
from tests.export.exporting import DRAWN

KEYS = ["model.component=dit", "training.ema.decay=0.5", "training.max_steps=2", "logging.save_interval=1"]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The other process is forked from one that has its libraries, which saves ten seconds of imports."""
    monkeypatch.setattr(verify, "python", warm.run)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A DiT half trained whole for two steps, a checkpoint of each, with held-out scores."""
    folder = tmp_path_factory.mktemp("run")
    keys = [*KEYS, "evaluation.enabled=true", "checkpoint.save_total_limit=null"]
    runs.trainer_of(folder, *DRAWN, *keys).train()
    return folder / "run"
