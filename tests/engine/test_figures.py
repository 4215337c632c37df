"""Figures of several terms, processes and steps: which mean is logged."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from glm_training.engine import figures
from glm_training.engine.figures import Interval, Mean, mean_divisor, mean_over_processes, stack_means
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
    monkeypatch.setattr(figures, "gather_objects", lambda world, own: [(row, 1.0) for row in rows])
    merged = mean_over_processes(World(), rows[0])
    assert merged == {"loss": pytest.approx(2.5), "ratio_max": 2.0, "kl": 3.0}


def test_a_process_counts_by_the_rows_it_has_seen(monkeypatch):
    seen = [({"loss": 1.0}, 3), ({"loss": 5.0, "kl": 2.0}, 1), ({}, 0)]
    monkeypatch.setattr(figures, "gather_objects", lambda world, own: seen)
    assert mean_over_processes(World(), *seen[0]) == {"loss": (3 * 1 + 1 * 5) / 4, "kl": 2.0}


def test_a_maximum_that_is_not_a_number_is_told(monkeypatch):
    rows = [{"ratio_max": 2.0}, {"ratio_max": float("nan")}, {"ratio_max": 1.0}]
    monkeypatch.setattr(figures, "gather_objects", lambda world, own: [(row, 1.0) for row in rows])
    assert mean_over_processes(World(), rows[0])["ratio_max"] != mean_over_processes(World(), rows[0])["ratio_max"]


# -- steps -------------------------------------------------------------------------------------------------------------

STEPS = [
    {
        "reward/total": Mean(0.5, 8),
        "reward/skipped_samples": 0.0,
        "reward/zero_spread_groups": 1.0,
        "ar/loss": 1.0,
        "ar/ratio_max": 3.0,
        "ar/learning_rate": 1e-4,
        "images_per_second": Mean(10 / 2, 2),  # 10 images in 2 s
        "gate/dit_ratio_max": 1e-6,
    },
    {
        "reward/total": Mean(0.2, 2),
        "reward/skipped_samples": 6.0,
        "reward/zero_spread_groups": 2.0,
        "ar/loss": 2.0,
        "ar/ratio_max": 2.0,
        "ar/learning_rate": 2e-4,
        "images_per_second": Mean(10 / 8, 8),
    },
    {"ar/loss": 6.0, "ar/ratio_max": 2.5, "ar/learning_rate": 3e-4, "images_per_second": Mean(10 / 10, 10)},
]
LINE = {
    "reward/total": (0.5 * 8 + 0.2 * 2) / 10,  # over the samples, and the steps that have it
    "reward/skipped_samples": 6.0,
    "reward/zero_spread_groups": 3.0,
    "ar/loss": 3.0,
    "ar/ratio_max": 3.0,
    "ar/learning_rate": 3e-4,
    "images_per_second": 30 / 20,
    "gate/dit_ratio_max": 1e-6,
}


def test_the_steps_of_an_interval_are_one_line():
    interval = Interval()
    for step in STEPS:
        interval.add(step)
    assert interval.figures() == pytest.approx(LINE)
    interval.clear()
    assert interval.figures() == {}


def test_one_step_alone_is_logged_as_it_is():
    interval = Interval()
    interval.add({"ar/loss": 0.1, "reward/total": Mean(0.7, 3), "ar/grad_norm": float("inf")})
    assert interval.figures() == {"ar/loss": 0.1, "reward/total": 0.7, "ar/grad_norm": float("inf")}


@pytest.mark.parametrize("after", [1, 2])
def test_an_interval_goes_on_from_a_checkpoint_to_the_last_bit(after):
    whole, first, second = Interval(), Interval(), Interval()
    for number, step in enumerate(STEPS):
        whole.add(step)
        if number == after:
            second.load(json.loads(json.dumps(first.state())))
        (first if number < after else second).add(step)
    undisturbed = {name: value for name, value in whole.figures().items() if name != "images_per_second"}
    assert {name: value for name, value in second.figures().items() if name != "images_per_second"} == undisturbed
    assert list(second.figures()) == list(whole.figures()), "the order of the names is the same too"
    assert "images_per_second" not in first.state(), "no two runs have the same one"


def test_a_users_metric_is_a_mean_whatever_its_name():
    interval = Interval()
    for value in (1.0, 3.0):
        interval.add({"reward/size_max": value, "reward/learning_rate": value})
    assert interval.figures() == {"reward/size_max": 2.0, "reward/learning_rate": 2.0}


def test_a_mean_keeps_its_weight_between_processes():
    again = pickle.loads(pickle.dumps(Mean(0.5, 8)))
    assert (again, again.weight) == (0.5, 8.0)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_chunks_weigh_by_their_rows(processes):
    """Chunks of 4, 1 and 3 rows, of which each process has some: their shares, averaged over the processes as DDP
    averages gradients, sum up to one, and are in proportion to their rows."""
    shares = [1 / mean_divisor(8, rows, World(0, processes)) for rows in (4, 1, 3)]
    assert sum(shares) / processes == pytest.approx(1)
    assert [share / processes for share in shares] == pytest.approx([4 / 8, 1 / 8, 3 / 8])


@pytest.mark.parametrize("chunks", [1, 3, 7, 10])
def test_chunks_of_equal_rows_are_divided_by_their_number_to_the_last_bit(chunks):
    loss = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 7
    divisor = mean_divisor(5 * chunks * 2, 5, World(1, 2))
    assert divisor == chunks and torch.equal(loss / divisor, loss / chunks)
