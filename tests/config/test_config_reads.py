"""The tracker of reads: what it counts, what it leaves out, and how blocks add up."""

from __future__ import annotations

import pytest

from glm_training.config import Config, config_diff, iter_keys, resolved_yaml
from tests.config_reads import ReadTracker


def make() -> Config:
    return Config.model_validate({"reward": {"metrics": {"text_accuracy": 1.0}}})


def test_leaves_are_counted_and_sections_are_not() -> None:
    tracker = ReadTracker()
    with tracker:
        config = make()
        grpo = config.reward.grpo
        assert tracker.reads == set()
        assert (config.seed, grpo.ar.kl_coef, config.data.image_size.width) == (42, None, 1024)
    assert tracker.reads == {"seed", "reward.grpo.ar.kl_coef", "data.image_size.width"}


def test_twin_sections_are_told_apart() -> None:
    tracker = ReadTracker()
    with tracker:
        config = make()
        assert config.optimizer.dit.name is None
        assert config.lora.ar.rank is None
    assert tracker.reads == {"optimizer.dit.name", "lora.ar.rank"}


def test_methods_count_what_they_look_at() -> None:
    tracker = ReadTracker()
    with tracker:
        make().lora_for("dit")
    assert {"lora.rank", "lora.dit.rank", "lora.dit_targets"} <= tracker.reads
    assert "lora.ar.rank" not in tracker.reads and "lora.ar_targets" not in tracker.reads


def test_checking_and_printing_do_not_count() -> None:
    tracker = ReadTracker()
    with tracker:
        config = make()
        resolved_yaml(config)
        config_diff(config, make())
        assert config == make() and repr(config)
    assert tracker.reads == set()


def test_blocks_add_up_and_nothing_is_counted_between_them() -> None:
    tracker, config = ReadTracker(), make()
    with tracker:
        assert config.seed == 42
    assert config.output_dir
    with tracker:
        assert config.model.name
    assert tracker.reads == {"seed", "model.name"}
    assert tracker.unread() == [key for key in iter_keys() if key not in ("seed", "model.name")]


def test_a_failing_run_ends_the_tracking() -> None:
    with pytest.raises(KeyError), ReadTracker():
        raise KeyError
    with ReadTracker() as tracker, pytest.raises(RuntimeError, match="active"), ReadTracker():
        pass
    assert tracker.reads == set()
