import pytest

from glm_training.export import verify
from tests.warm import run


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    """The other process is forked from one that has its libraries, which saves ten seconds of imports."""
    monkeypatch.setattr(verify, "python", run)
