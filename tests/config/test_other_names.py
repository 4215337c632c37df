"""Names that other trainers have for keys, and values in place of sections, are answered with what to write here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glm_training.config import Config, ConfigError, load_config
from glm_training.config.docs.describe import walk
from glm_training.config.loading.other_names import IN_PLACE_OF_SECTIONS, OTHER_NAMES, own_name

ROOT = Path(__file__).parents[2]
VALID = "reward: {metrics: {text_accuracy: 1.0}}\n"


def suggestion(tmp_path: Path, text: str, *overrides: str) -> str | None:
    (tmp_path / "run.yaml").write_text(VALID + text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", overrides)
    (problem,) = caught.value.problems
    return problem.suggestion


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("training: {lr: 1.0e-4}", "training.learning_rate"),
        ("lr: 1.0e-4", "training.learning_rate"),
        ("training: {batch: 4}", "training.batch_size"),
        ("training: {steps: 4}", "training.max_steps"),
        ("data: {resolution: 512}", "data.image_size: {height: 1024, width: 1024}"),
        ("data: {train_data_dir: pics}", "data.images"),
        ("data: {instance_prompt: sks}", "data.trigger_word"),
        ("lora: {network_dim: 4}", "lora.rank"),
        ("rank: 4", "lora.rank"),
        ("use_8bit_adam: true", "training.optimizer: adamw_8bit"),
        ("pretrained-model-name-or-path: x", "model.name"),
    ],
)
def test_a_name_of_others_is_answered_with_the_key(tmp_path: Path, text: str, key: str) -> None:
    assert suggestion(tmp_path, text) == f"Did you mean `{key}`?"


def test_overrides_are_answered_alike(tmp_path: Path) -> None:
    assert suggestion(tmp_path, "", "training.lr=1e-4") == "Did you mean `training.learning_rate`?"


@pytest.mark.parametrize(
    ("text", "write"),
    [
        ("data: pics", "{images: pics}"),
        ("model: tiny", "{name: tiny}"),
        ("model: zai-org/GLM-Image", "{name: zai-org/GLM-Image}"),
        ("lora: 16", "{enabled: true, rank: 16}"),
        ("lora: runs/x", "{enabled: true, start_from: runs/x}"),
        ("evaluation: held_out", "{eval_images: held_out}"),
        ("data: {image_size: 512}", "{height: 512, width: 512}"),
    ],
)
def test_a_value_in_place_of_a_section_is_put_where_it_belongs(tmp_path: Path, text: str, write: str) -> None:
    assert suggestion(tmp_path, text) == f"Write {write}."


def test_what_would_not_be_read_back_is_not_repeated(tmp_path: Path) -> None:
    assert suggestion(tmp_path, 'data: "https://user:secret@host/x: y"') is None


def test_suggestions_name_keys_that_there_are() -> None:
    keys = {key.path for key in walk(Config)}
    sections = {path.rpartition(".")[0] for path in keys}
    for name, told in OTHER_NAMES.items():
        assert told.partition(":")[0] in keys | sections, (name, told)
    for section, kinds in IN_PLACE_OF_SECTIONS.items():
        inner = [key for text in kinds.values() for key in re.findall(r"(\w+):", text)]
        assert inner and {f"{section}.{key}" for key in inner} <= keys


def test_no_key_is_taken_for_a_name_of_others() -> None:
    """A name at the top or in its section is ours first."""
    top = set(Config.model_fields)
    assert not top & set(OTHER_NAMES)
    for name, told in OTHER_NAMES.items():
        section = told.partition(":")[0].rpartition(".")[0]
        own = f"{section}.{name}"
        assert own == told or own not in {key.path for key in walk(Config)}


def test_names_of_the_guides_table_are_known() -> None:
    """Each row of docs/coming_from.md on LoRAs and DPO that gives one key for a few names of others."""
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    table = text[text.index("## LoRA on own pictures") : text.index("## DMDR")]
    count = 0
    for row in re.findall(r"^\| (`[^|]*`) \| (`[^|]*) \|$", table, re.MULTILINE):
        theirs = [name.lstrip("-") for name in re.findall(r"`(-*\w+)`", row[0])]
        ours = re.match(r"`([a-z_]+\.[a-z_.]+)", row[1])
        if len(theirs) != len(re.findall("`", row[0])) // 2 or ours is None:
            continue
        first = own_name(theirs[0])
        known = first is not None or any(key.path.endswith(f".{theirs[0]}") for key in walk(Config))
        assert known, row
        count += 1
    assert count > 10
