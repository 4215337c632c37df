"""Update rules whose packages are not here, or too old, are told before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from glm_training.engine.errors import SettingsError
from glm_training.engine.optimizers import check_optimizer


@pytest.mark.parametrize(
    ("rule", "package", "extra"),
    [
        ("prodigy", "prodigyopt", "prodigy"),
        ("lion", "lion_pytorch", "lion"),
        ("adamw_schedule_free", "schedulefree", "schedulefree"),
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_rule_without_its_package_names_the_extra(rule, package, extra, monkeypatch):
    from importlib import util

    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(SettingsError, match=rf'{rule} needs {package}: pip install "glm_training\[{extra}\]"'):
        check_optimizer(rule, torch.device("cpu"))


def test_an_older_bitsandbytes_has_no_steps_on_a_cpu(monkeypatch):
    from glm_training.engine import optimizers

    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(optimizers, "version", lambda name: "0.49.2")
    with pytest.raises(SettingsError, match="adamw_8bit needs bitsandbytes 0.50 or newer on a CPU, and this is 0.49.2"):
        check_optimizer("adamw_8bit", torch.device("cpu"))
    check_optimizer("adamw_8bit", torch.device("cuda"))
    monkeypatch.setattr(optimizers, "version", lambda name: "0.50.0")
    check_optimizer("adamw_8bit", torch.device("cpu"))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 not installed")
def test_muon_is_told_to_need_a_newer_torch(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SettingsError, match="muon needs torch 2.9 or newer.*use adamw"):
        check_optimizer("muon", torch.device("cpu"))
