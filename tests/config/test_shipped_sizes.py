"""The configurations that come with the package fit the data that come with it, and themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm_training.config import Config, load_config

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
DRAWN = "runs/tiny_world/train"
"""What examples/tiny_glm_image/make_captioned.py draws."""
LENGTHENED = {"glm_dit_distill_tiny"}
"""Runs that the documents start with more steps on the command line, and whose intervals are for these."""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def entries(path: Path) -> list[str] | None:
    """The prompts of a file or folder of pairs, counted without the package; None where it does not come along."""
    if path.is_dir():
        path = path / "metadata.jsonl"
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [json.loads(line)["prompt"] for line in lines] if path.suffix == ".jsonl" else lines


def steps(config: Config) -> int:
    """Of the run, in one process: as many as it says, or as its epochs make."""
    training, prompts = config.training, entries(config.dataset_file())
    if training.max_steps is not None:
        return training.max_steps
    assert prompts is not None, "a run on data that do not come along says how long it is"
    return -(-(len(prompts) * training.num_epochs) // (training.batch_size * training.gradient_accumulation_steps))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_run_is_long_enough_for_its_schedules(path):
    config = load_config(path)
    total, logging = steps(config), config.logging
    for part in config.parts():
        warmup = config.optimizer_for(part).warmup_steps
        assert 5 * warmup <= total, f"{part} spends over a fifth of {total} steps warming up ({warmup})"
    assert logging.log_interval <= total
    if path.stem not in LENGTHENED:
        assert logging.save_interval <= total and logging.eval_interval <= total
        assert (logging.sample_every() or 1) <= total
    if config.training.method == "dmdr":
        assert (config.dmdr.cold_start_steps or 0) <= total and config.dmdr.update_ratio <= total


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_data_hold_what_is_asked_of_them(path):
    config = load_config(path)
    prompts = entries(config.dataset_file())
    if prompts is None:
        brought = path.stem.startswith(("sdxl_", "vgt_")) and "tiny" not in path.stem  # by the user, or downloaded
        drawn = config.data.images is not None and [str(one.path) for one in config.data.images] == [DRAWN]
        assert brought or drawn
        return
    at_once = config.training.batch_size * config.training.gradient_accumulation_steps
    assert at_once <= len(prompts), "one step would see a prompt twice"
    held_out = config.evaluation.eval_prompts_file
    drawn = prompts if held_out is None else entries(held_out)
    assert drawn is not None and config.evaluation.num_eval_samples <= _examples(config, drawn)
    assert config.logging.num_log_images <= config.evaluation.num_eval_samples
    for given in (config.evaluation.eval_prompts_file, config.evaluation.eval_pairs):
        if given is not None:
            assert entries(given), f"{given} does not come along"
    for folder in (config.target_images_dir(), config.data.source_images_dir):
        if folder is not None:
            assert len(list(folder.iterdir())) == len(prompts)


def _examples(config: Config, prompts: list[str]) -> int:
    """How many different pictures can be asked for: of pairs, one per prompt; an edit is one with its source."""
    return len(prompts) if config.training.mode == "i2i" else len(set(prompts))


def test_runs_on_given_prompts_are_judged_on_others():
    """Held-out prompts that are also trained on would say nothing; an edit may be the same of another picture."""
    judged = 0
    for path in SHIPPED:
        config = load_config(path)
        training = entries(config.dataset_file())
        for given in (config.evaluation.eval_prompts_file, config.evaluation.eval_pairs):
            held_out = None if given is None else entries(given)
            if training is None or held_out is None:
                continue
            judged += 1
            if config.training.mode == "t2i":
                assert not set(training) & set(held_out), path
            else:
                sources = config.data.source_images_dir, config.evaluation.eval_source_images_dir
                seen, new = ({path.read_bytes() for path in folder.iterdir()} for folder in sources)
                assert not seen & new, path
    assert judged >= 7


def test_every_shipped_file_was_looked_at():
    assert len(SHIPPED) >= 15 and LENGTHENED <= {path.stem for path in SHIPPED}
