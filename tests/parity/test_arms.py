"""One process = two with whole copies (DDP) = two with shards (FSDP) = two replicas of two shards (HSDP), after four
steps of each kind of training.

The suite has each kind, strategy, update rule, and whole weights and adapters (the other files here have two steps with
SGD under DDP and FSDP). All of them: `tests/parity/arms.py`; what came of those that were run:
benchmarks/results/arms.json.
"""

from __future__ import annotations

import pytest

from tests.parity.arms import ALL, LEAST, SHARE, Outcome, Pair, outcomes
from tests.parity.arms_worker import ARMS, KINDS, RULES

RUN: list[Pair] = [
    ("grpo-ar/adam/whole", "hsdp"),
    ("grpo-dit/adam/adapters", "hsdp"),
    ("grpo-both/sgd/adapters", "fsdp"),
    ("sft/adam/whole", "fsdp"),
    ("dpo/adam/adapters", "hsdp"),
    ("dpo-sdxl/adam/whole", "fsdp"),
    ("dmdr/sgd/whole", "hsdp"),
    ("dmdr-sdxl/adam/adapters", "ddp"),
    ("vgt-autoencoder/adam/whole", "hsdp"),
    ("vgt-generator/adam/whole", "hsdp"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[Pair, Outcome]:
    return outcomes(tmp_path_factory.mktemp("arms"), RUN)


@pytest.mark.parametrize("pair", RUN, ids=":".join)
def test_several_processes_come_to_the_weights_of_one(found, pair):
    outcome = found[pair]
    assert min(outcome.moved.values()) >= LEAST, "a part did not learn"
    assert outcome.share <= SHARE, outcome


def test_the_suite_has_each_of_what_there_is():
    assert set(RUN) <= set(ALL)
    kinds, rules, what = (set(words) for words in zip(*(case.split("/") for case, _ in RUN), strict=True))
    assert kinds == set(KINDS) and rules == set(RULES) and what == {"whole", "adapters"}
    assert {arm for _, arm in RUN} == {arm for arms in ARMS.values() for arm in arms}
