"""The shipped files, the documented one, the table in the docs, and a configuration as text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt

from glm_training.config import (
    Config,
    ConfigError,
    config_diff,
    docs_table,
    iter_keys,
    json_schema,
    keys,
    load_config,
    resolved_yaml,
    update_docs,
)
from glm_training.config.docs.reference import DRIFT_FREE
from glm_training.config.sections.reward_options import RemoteRewardConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))

DOCUMENTED = """\
# Model settings
model:
  name: "zai-org/GLM-Image"
  component: "both"  # Options: "ar", "dit", "both"

# Training settings
training:
  mode: "t2i"  # Options: "t2i", "i2i"
  batch_size: 2
  num_epochs: 10
  learning_rate: 1e-5
  use_reward: true

# Multi-GPU settings
distributed:
  enabled: true
  backend: "nccl"

# Reward settings
reward:
  enabled: true
  target_images_dir: "data/t2i/target_images"
  metrics:
    - lpips
    - aesthetic
    - text_accuracy
  weights:
    lpips: 0.4
    aesthetic: 0.3
    text_accuracy: 0.3
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "documented.yaml"
    path.write_text(DOCUMENTED, encoding="utf-8")
    return load_config(path)


def test_the_documented_yaml_loads(config: Config) -> None:
    assert config.output_dir == Path("runs/documented")
    assert (config.training.batch_size, config.training.num_epochs) == (2, 10)
    assert config.optimizer_for("ar").learning_rate == config.optimizer_for("dit").learning_rate == 1e-5
    assert config.reward.metric_weights() == {"lpips": 0.4, "aesthetic": 0.3, "text_accuracy": 0.3}
    assert config.target_images_dir() == Path("data/t2i/target_images")
    assert config.dataset_file() == Path("data/t2i/prompts.txt")
    assert (config.distributed.enabled, config.distributed.backend) == (True, "nccl")


def test_there_are_shipped_configurations() -> None:
    names = {path.name for path in SHIPPED}
    assert {"t2i_training.yaml", "i2i_training.yaml", "quickstart.yaml", "quickstart_i2i.yaml"} <= names


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == Path("runs") / path.stem
    components = ("ar", "dit", "both") if config.training.method != "dmdr" else ("dit",)
    for component in components if config.model.family == "glm_image" else (config.model.component,):
        assert load_config(path, component=component).model.component == component


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
def test_training_configurations_hold_the_documented_defaults(mode: str) -> None:
    shipped = load_config(ROOT / "configs" / f"{mode}_training.yaml")
    data = {"target_images_dir": f"data/{mode}/target_images"}
    bare = Config.model_validate({"training": {"mode": mode}, "data": data, "output_dir": shipped.output_dir})
    assert shipped.reward.metric_weights() == bare.reward.metric_weights()
    for part in ("ar", "dit"):
        sized = replace(bare.optimizer_for(part), warmup_steps=shipped.training.warmup_steps)
        assert shipped.optimizer_for(part) == sized
    written_otherwise = {"reward.metrics", "reward.weights", "reward.target_images_dir"}
    written_otherwise |= {"training.ar_learning_rate", "training.dit_learning_rate"}
    # What fits the length of the run to the data that come with the package.
    written_otherwise |= {"training.num_epochs", "training.warmup_steps"}
    # What makes 16 B parameters fit one GPU: adapters, small forward passes, fewer denoising steps while training.
    written_otherwise |= {"lora.enabled", "rollout.micro_batch_size", "rollout.vae_batch_size"}
    written_otherwise |= {"rollout.num_inference_steps", "reward.grpo.dit.clip_range"}
    assert {line.split(":")[0] for line in config_diff(bare, shipped)} <= written_otherwise


def test_resolved_yaml_loads_to_the_same(tmp_path: Path, config: Config) -> None:
    other = {
        "rollout": {"plans_per_prompt": 3, "renders_per_plan": 3},
        "training": {"mode": "i2i", "mixed_precision": "no"},
    }
    data = {"target_images_dir": "t", "source_images_dir": "s"}
    for number, original in enumerate((config, Config.model_validate({**other, "data": data}))):
        path = tmp_path / f"{number}.yaml"
        path.write_text(resolved_yaml(original), encoding="utf-8")
        assert load_config(path) == original
        assert load_config(path).output_dir == original.output_dir


def test_resolved_yaml_shows_every_key_and_what_it_comes_to(config: Config) -> None:
    text = resolved_yaml(config)
    tree = yaml.safe_load(text)
    for key in iter_keys():
        node = tree
        for name in key.split("."):
            node = node[name]
    assert "# images per prompt: 2 plans x 2 renders\n" in text
    assert "# ar optimizer: {name: adamw, learning_rate: 1e-05," in text


def test_differences(config: Config) -> None:
    changed = config.model_copy(
        update={
            "seed": 7,
            "training": config.training.model_copy(update={"max_steps": 5, "batch_size": 4}),
            "logging": config.logging.model_copy(update={"log_interval": 1}),
        }
    )
    assert config_diff(config, config) == []
    assert config_diff(config, changed) == [
        "seed: 42 -> 7",
        "training.batch_size: 2 -> 4",
        "training.max_steps: None -> 5",
    ]
    assert config_diff(config, changed, ["training.max_steps", "seed"]) == ["training.batch_size: 2 -> 4"]
    assert config_diff(config, changed, ["training", "seed"]) == []


def test_the_docs_table_is_up_to_date(tmp_path: Path) -> None:
    path = ROOT / "docs" / "configuration.md"
    text = path.read_text(encoding="utf-8")
    copy = tmp_path / "configuration.md"
    copy.write_text(text, encoding="utf-8")
    assert not update_docs(copy), (
        'docs/configuration.md is behind the schema; run: python -c "from pathlib import Path; '
        "from glm_training.config import update_docs; update_docs(Path('docs/configuration.md'))\""
    )
    assert all(f"`{name}`" in text for name in DRIFT_FREE)


def test_the_docs_table_has_one_row_per_key() -> None:
    rows = [line for line in docs_table().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(iter_keys())
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_every_key_is_described_in_one_line() -> None:
    for key in keys():
        assert key.description and "\n" not in key.description and key.description.endswith("."), key.path
        assert key.allowed, key.path


def test_json_schema() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainingConfig"]["properties"]["lr_scheduler"]["enum"] == [
        "constant",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
    ]


CHECKED_ELSEWHERE = {
    "reward.metrics": "weights, in checks.cross_field",
    "reward.weights": "weights, in checks.cross_field",
    "reward.ar.weights": "weights, in checks.cross_field",
    "reward.dit.weights": "weights, in checks.cross_field",
    "dmdr.reward.weights": "weights, in checks.family",
    "rollout.sde_window_range": "a range of the denoising steps, in checks.method",
    "dmdr.renoise_range": "a range within [0, 1], in checks.family",
    "reward.grpo.dit.old_decay": "0 to 1, on the number among its alternatives",
}


def test_every_number_has_bounds_on_both_sides() -> None:
    """A number that cannot be meant is refused, not met as an overflow or an endless run."""
    for key in keys():
        if not re.search(r"\b(int|float)\b", str(key.field.annotation)) or key.path in CHECKED_ELSEWHERE:
            continue
        low = [item for item in key.field.metadata if isinstance(item, Ge | Gt)]
        high = [item for item in key.field.metadata if isinstance(item, Le | Lt)]
        assert low and high, f"{key.path} needs ge or gt and le or lt"
    for entry in RemoteRewardConfig.model_fields.values():
        if re.search(r"\b(int|float)\b", str(entry.annotation)):
            assert any(isinstance(item, Le | Lt) for item in entry.metadata)


@pytest.mark.parametrize(
    "override",
    [
        f"seed={2**70}",
        "training.batch_size=1000000000",
        "lora.rank=1000000000",
        "training.learning_rate=1e300",
        "training.num_epochs=1e30",
        "training.num_epochs=1000000000000",
        "model.ar.temperature=.inf",
        "reward.weights={text_accuracy: 1e300}",
        "model.dit.num_inference_steps=100000",
        "model.ar.temperature=1e-300",
        "rollout.temperature=1e-40",
        "model.ar.top_p=1e-300",
        "rollout.top_p=1e-40",
        "rollout.eta=1e-300",
        "rollout.eta=1000000",
        "training.adam_epsilon=1e-300",
        "optimizer.dit.epsilon=1e-46",
        "lora.alpha=1e-300",
        "reward.grpo.dit.nft_beta=1e-300",
    ],
)
def test_numbers_that_cannot_be_are_refused_with_their_key(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("reward: {weights: {text_accuracy: 1.0}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config(path, [override])
