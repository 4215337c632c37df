"""What a run is told of libraries that do not fit."""

from __future__ import annotations

import sys

import pytest

from glm_training.utils.requirements import check_requirements


def test_libraries_that_fit_pass():
    check_requirements()


def test_a_torchvision_of_another_build_is_told_with_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(
        ImportError, match=r"^torchvision \S+ does not load beside torch \S+: operator torchvision::nms "
    ):
        check_requirements()
