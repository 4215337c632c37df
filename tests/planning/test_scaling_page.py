"""The page on scaling says what was measured."""

from __future__ import annotations

import pytest

from benchmarks.plan_shards import case_named, worked_out
from benchmarks.plan_table import GIB
from benchmarks.scaling import ARMS, INFINIBAND, NVLINK, PAGE, TABLES, expected_bytes, read, rewritten, seconds_of

WITHIN = 0.10


def test_the_page_is_what_the_results_say():
    """Else: python -m benchmarks.scaling"""
    text = PAGE.read_text(encoding="utf-8")
    assert all(len(table.findall(text)) == 1 for table in TABLES)
    assert rewritten(text) == text


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "alone"])
def test_measured_bytes_are_those_of_the_calls(arm):
    """But for losses and words between the processes."""
    told = read("scaling")[arm]
    assert told["bytes_per_step"] == pytest.approx(expected_bytes(told), rel=0.01)


@pytest.mark.parametrize(
    ("arm", "weights"), {"ddp-2": 2, "ddp-4": 6, "fsdp-2": 4, "fsdp-4": 12, "hsdp-2x2": 10}.items()
)
def test_worked_out_bytes_are_those_of_the_strategy(arm, weights):
    """In sizes of the trained weights, as the page derives them."""
    report = read("scaling")
    assert expected_bytes(report[arm]) == pytest.approx(weights * 4 * report["trained_parameters"], rel=0.02)


def test_seconds_of_a_ring_are_those_of_its_slowest_edge():
    assert seconds_of("all_gather", 8e9, 8, spread=False) == pytest.approx(7e9 / NVLINK)
    # an edge between nodes takes what any other does, an eighth of it by each port
    slowest = max(1 / NVLINK, 1 / 8 / INFINIBAND)
    assert seconds_of("reduce_scatter", 64e9, 64, spread=False) == pytest.approx(63e9 * slowest)
    assert seconds_of("all_reduce", 8e9, 8, spread=True) == pytest.approx(2 * 7e9 / INFINIBAND)


def test_arms_came_to_the_same_losses():
    report = read("scaling")
    assert report.keys() >= ARMS.keys()
    assert report["largest_difference_of_losses"] <= 1e-4


@pytest.mark.parametrize(
    "each", read("plan_shards")["cases"], ids=lambda each: f"{each['name']} on {each['processes']}"
)
def test_peaks_of_a_process_with_shards(each):
    expected = worked_out(case_named(each["name"]), each["processes"], each["shard_size"])
    assert expected == pytest.approx(each["passes"] * GIB, rel=WITHIN)
