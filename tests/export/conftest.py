import pytest

from glm_training.export import verify
from tests.export.exporting import start_warm


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    monkeypatch.setattr(verify.subprocess, "run", start_warm)
