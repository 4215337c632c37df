"""Figures of several terms and processes: which mean is logged."""

from __future__ import annotations

import pytest
import torch

from glm_training.engine import figures
from glm_training.engine.figures import mean_over_processes, stack_means
from glm_training.utils.distributed import World


def test_a_term_counts_by_its_rows():
    terms = [
        (1, {"loss": torch.tensor(1.0), "ratio_max": torch.tensor(3.0)}),
        (3, {"loss": torch.tensor(5.0), "ratio_max": torch.tensor(2.0)}),
    ]
    assert stack_means(terms) == {"loss": (1 * 1 + 3 * 5) / 4, "ratio_max": 3.0}


def test_a_figure_is_the_mean_of_the_terms_that_have_it():
    terms = [(2, {"loss": torch.tensor(1.0)}), (6, {"kl": torch.tensor(0.5)}), (2, {"loss": torch.tensor(2.0)})]
    assert stack_means(terms) == {"loss": 1.5, "kl": 0.5}
    assert stack_means([]) == {}


def test_half_precision_figures_are_added_up_in_single_precision():
    """In bf16 256 + 1 is 256."""
    terms = [(1, {"loss": torch.tensor(value, dtype=torch.bfloat16)}) for value in (256.0, 1.0)]
    assert stack_means(terms) == {"loss": 128.5}


def test_processes_are_averaged_and_maxima_kept(monkeypatch):
    rows = [{"loss": 1.0, "ratio_max": 2.0}, {"loss": 4.0, "ratio_max": 0.5, "kl": 3.0}]
    monkeypatch.setattr(figures, "gather_objects", lambda world, own: rows)
    merged = mean_over_processes(World(), rows[0])
    assert merged == {"loss": pytest.approx(2.5), "ratio_max": 2.0, "kl": 3.0}
