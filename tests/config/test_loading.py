"""From YAML text and overrides to a Config or to the list of all problems."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from glm_training.config import Config, ConfigError, Problem, load_config

VALID = "model: {name: tiny}\nreward: {metrics: {text_accuracy: 1.0}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> Config:
    return load_config(write(folder, text), overrides)


def problems(folder: Path, text: str, *overrides: str, mode: str | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides, mode=mode)
    return caught.value.problems


def only(found: list[Problem]) -> Problem:
    assert len(found) == 1, [str(problem) for problem in found]
    return found[0]


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "training:\n  lerning_rate: 1e-5\n"))
    assert (problem.line, problem.path) == (4, "training.lerning_rate")
    assert problem.file.endswith("run.yaml")
    assert problem.message == "unknown key."
    assert problem.suggestion == "Did you mean `training.learning_rate`?"


def test_key_of_another_section_is_pointed_to(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "data:\n  batch_size: 2\n"))
    assert problem.suggestion == "There is `training.batch_size`."


def test_key_of_the_sections_below_is_pointed_to(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "optimizer:\n  name: lion\n"))
    parts = ("ar", "dit", "unet", "autoencoder")
    assert problem.suggestion == (
        f"There is {', '.join(f'`optimizer.{part}.name`' for part in parts)} and `optimizer.generator.name`."
    )


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("optimizer: lion", "There is `training.optimizer`."),
        ("lora: true", "Write {enabled: true}."),
        ("vgt: tiny", None),
        ("checkpoint: true", None),
    ],
)
def test_value_in_place_of_a_section(tmp_path: Path, text: str, suggestion: str | None) -> None:
    problem = only(problems(tmp_path, VALID + text + "\n"))
    assert "is not allowed; allowed: a section with the keys " in problem.message
    assert problem.suggestion == suggestion


def test_unknown_section(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "trainning:\n  batch_size: 2\n"))
    assert (problem.line, problem.path) == (3, "trainning")
    assert problem.suggestion == "Did you mean `training`?"


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = """\
model:
  component: both
  nme: tiny
training:
  batch_size: "2"
  lr_scheduler: cosin
  lr_scheduler: cosine
  max_steps: soon
data:
  image_size: {height: 1000}
reward:
  metrics: [lpips, aesthetic]
  weights: {lpips: 1.0}
  grpo: {num_samples: 5}
lora: 3
"""
    found = problems(tmp_path, text, "seed=x", "logging.log_intervall=3", mode="t3i")
    assert [(problem.line, problem.path) for problem in found] == [
        (3, "model.nme"),
        (5, "training.batch_size"),
        (7, "training.lr_scheduler"),
        (8, "training.max_steps"),
        (9, "data.target_images_dir"),
        (10, "data.image_size.height"),
        (12, "reward.metrics"),
        (14, "reward.grpo.num_samples"),
        (15, "lora"),
        (None, "seed"),
        (None, "training.mode"),
        (None, "logging.log_intervall"),
    ]
    text = str(ConfigError(found))
    assert text.startswith("12 problems in the configuration:\n")
    allowed = "integer >= 32 and <= 8192 and divisible by 32."
    assert f"run.yaml:10: data.image_size.height: 1000 is not allowed; allowed: {allowed}" in text
    assert "override `seed=x`: seed: 'x' is not allowed; allowed: integer >= 0 and <= 9223372036854775807." in text
    assert "--mode t3i: training.mode" in text


def test_no_follow_up_problems_of_a_faulty_key(tmp_path: Path) -> None:
    found = problems(tmp_path, "reward:\n  metrics: [lpips]\n  weights: {lpips: high}\n  target_images_dir: t\n")
    assert only(found).path == "reward.weights.lpips"


def test_both_entries_of_a_mapping(tmp_path: Path) -> None:
    found = problems(tmp_path, "reward:\n  metrics:\n    text_accuracy: a\n    structure: b\n")
    assert [(problem.line, problem.path) for problem in found] == [
        (3, "reward.metrics.text_accuracy"),
        (4, "reward.metrics.structure"),
    ]


def test_duplicate_keys(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "seed: 1\ntraining: {batch_size: 1}\nseed: 1\n"))
    assert (problem.line, problem.path) == (5, "seed")
    assert "first is in line 3" in problem.message
    problem = only(problems(tmp_path, VALID + "training:\n  batch_size: 1\n  batch_size: 1\n"))
    assert problem.path == "training.batch_size"


def test_duplicate_keys_in_flow_lists_of_mappings_do_not_crash(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, VALID + "resume: {accept: [{a: 1}]}\n"))
    assert problem.path == "resume.accept"


@pytest.mark.parametrize("text", ["model: [1", "a: b: c\n", "\tmodel: 1\n"])
def test_broken_yaml_is_one_problem(tmp_path: Path, text: str) -> None:
    problem = only(problems(tmp_path, text))
    assert "not valid YAML" in problem.message
    assert problem.line is not None


def test_file_that_is_no_mapping(tmp_path: Path) -> None:
    assert "top level" in only(problems(tmp_path, "- 1\n- 2\n")).message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_self_containing_yaml_does_not_hang(tmp_path: Path) -> None:
    problem = only(problems(tmp_path, "training: &t\n  training: *t\n"))
    assert (problem.line, problem.message) == (1, "not valid YAML: `training.training` contains itself.")


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    text = VALID + "lora:\n  ar: &half {rank: 4, alpha: 8}\n  dit: {<<: *half, rank: 16}\n"
    config = load(tmp_path, text)
    assert (config.lora.ar.rank, config.lora.dit.rank, config.lora.dit.alpha) == (4, 16, 8.0)


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", "10e-6", "+1e-05", ".1e-4", "!!float 1e-5"])
def test_floats(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{VALID}training: {{learning_rate: {text}}}\n").training.learning_rate == pytest.approx(1e-5)
    assert load(tmp_path, VALID, f"training.learning_rate={text}").training.learning_rate == pytest.approx(1e-5)


@pytest.mark.parametrize("text", [".inf", ".nan", "-1e-5", "0", "true", '"1e-5"'])
def test_no_floats(tmp_path: Path, text: str) -> None:
    assert only(problems(tmp_path, f"{VALID}training: {{learning_rate: {text}}}\n")).path == "training.learning_rate"


@pytest.mark.parametrize("text", ["no", '"no"', "false"])
def test_mixed_precision_no(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{VALID}training: {{mixed_precision: {text}}}\n").training.mixed_precision == "no"
    assert load(tmp_path, VALID, f"training.mixed_precision={text}").training.mixed_precision == "no"


def test_mixed_precision_yes_is_an_error(tmp_path: Path) -> None:
    assert "`bf16`" in only(problems(tmp_path, VALID + "training: {mixed_precision: yes}\n")).message


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("training: {batch_size: 2.0}", "Write 2."),
        ("training: {batch_size: '2'}", "Write it without quotes."),
        ("logging: {wandb_project: 2024}", "Write it in quotes."),
        ("data: {image_size: {width: 1000}}", "The nearest are 992 and 1024."),
        ("model: {component: dti}", "Did you mean `dit`?"),
    ],
)
def test_remedies(tmp_path: Path, line: str, remedy: str) -> None:
    found = problems(tmp_path, f"reward: {{metrics: {{text_accuracy: 1.0}}}}\n{line}\n")
    assert only(found).suggestion == remedy


@pytest.mark.parametrize(
    "line", ["training: {batch_size: true}", "logging: {use_wandb: 1}", "data: {prompts_file: ''}"]
)
def test_no_type_is_bent(tmp_path: Path, line: str) -> None:
    assert only(problems(tmp_path, f"reward: {{metrics: {{text_accuracy: 1.0}}}}\n{line}\n"))


def test_empty_sections_and_nulls(tmp_path: Path) -> None:
    config = load(tmp_path, VALID + "training:\nlora:\n  ar:\noutput_dir:\n")
    assert config.training.batch_size == 1
    assert config.lora.ar.rank is None
    assert config.output_dir == Path("runs/run")


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        VALID + "training: {max_steps: 5, batch_size: 3}\n",
        "training.max_steps=null",
        "seed=1",
        "seed=7",
        "lora.ar_targets=[q_proj, v_proj]",
        "data.image_size.height=64",
        "logging.use_wandb=true",
        "reward.metrics={structure: 0.5, my.own:Metric: 0.5}",
        "reward.options.structure.reference=target",
        "data.target_images_dir=a=b",
        "logging.wandb_entity='2'",
    )
    assert config.training.max_steps is None
    assert config.training.batch_size == 3
    assert config.seed == 7
    assert config.lora.ar_targets == ["q_proj", "v_proj"]
    assert (config.data.image_size.height, config.data.image_size.width) == (64, 128)
    assert config.logging.use_wandb is True
    assert config.reward.metric_weights() == {"structure": 0.5, "my.own:Metric": 0.5}
    assert config.target_images_dir() == Path("a=b")
    assert config.logging.wandb_entity == "2"


def test_override_below_a_mapping(tmp_path: Path) -> None:
    config = load(tmp_path, VALID, "reward.metrics.my.own:Metric=0.25", "reward.metrics.text_accuracy=0.75")
    assert config.reward.metric_weights() == {"text_accuracy": 0.75, "my.own:Metric": 0.25}


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("training.max_stps=3", "training.max_stps"),
        ("training.max_steps=three", "training.max_steps"),
        ("trainer.steps=3", "trainer"),
        ("model.name.size=3", "model.name.size"),
        ("max_steps", ""),
        ("=3", ""),
        ("training..max_steps=3", ""),
        ("lora.ar_targets=[q_proj", "lora.ar_targets"),
        ("reward.grpo.num_samples=5", "reward.grpo.num_samples"),
        ("reward.metrics.text_accuracy=0", "reward.metrics.text_accuracy"),
        ("reward.metrics=text_accuracy", "reward.metrics"),
        ("output_dir=", "output_dir"),
        ("output_dir=  ", "output_dir"),
        ("data.prompts_file=#prompts.txt", "data.prompts_file"),
        ("output_dir=---", "output_dir"),
        ("output_dir=runs/exp #3", "output_dir"),
        ("data.image_size={height: 64} # small", "data.image_size"),
    ],
)
def test_override_problems(tmp_path: Path, override: str, path: str) -> None:
    problem = only(problems(tmp_path, VALID, override))
    assert (problem.file, problem.line, problem.path) == (f"override `{override}`", None, path)


@pytest.mark.parametrize(
    ("value", "read"), [("null", None), ("~", None), ("'#3'", "#3"), ("a#3", "a#3"), ("'a #3'", "a #3"), ("''", None)]
)
def test_nulls_and_number_signs_that_are_meant(tmp_path: Path, value: str, read: str | None) -> None:
    override = f"logging.wandb_entity={value}"
    if value == "''":
        assert "'' is not allowed" in only(problems(tmp_path, VALID, override)).message
    else:
        assert load(tmp_path, VALID, override).logging.wandb_entity == read


def test_what_is_left_out_of_an_override_is_told(tmp_path: Path) -> None:
    """An empty variable of a shell, or a comment, would start another run than was meant."""
    empty = only(problems(tmp_path, VALID, "output_dir="))
    assert (
        str(empty) == "override `output_dir=`: output_dir: nothing stands after `=`. Write `null` where that is meant."
    )
    comment = only(problems(tmp_path, VALID, "output_dir=runs/exp #3"))
    assert (comment.message, comment.suggestion) == ("`#3` would be left out as a comment.", "Quote the value.")


def test_a_key_named_like_a_secret_is_told_as_any_other(tmp_path: Path) -> None:
    found = only(problems(tmp_path, VALID + "logging:\n  wandb_api_key: 0123abcd\n"))
    assert str(found).endswith("run.yaml:4: logging.wandb_api_key: unknown key. Did you mean `logging.wandb_entity`?")
    assert "0123abcd" not in str(only(problems(tmp_path, VALID + "logging:\n  wandb_api_key: !!int 0123abcd\n")))


def test_override_of_a_mapping_takes_the_place_of_its_lines(tmp_path: Path) -> None:
    text = "reward:\n  metrics:\n    text_accuracy: 1.0\n"
    problem = only(problems(tmp_path, text, "reward.metrics={text_accuracy: 0}"))
    assert (problem.file, problem.line) == ("override `reward.metrics={text_accuracy: 0}`", None)


@pytest.mark.parametrize("text", ["1: 2\n", "on: 2\n", "null: 2\n", "training: {1.5: 2}\n"])
def test_keys_are_taken_as_text(tmp_path: Path, text: str) -> None:
    problem = only(problems(tmp_path, VALID + text))
    assert (problem.line, problem.message) == (3, "unknown key.")


def test_mode_and_component_win(tmp_path: Path) -> None:
    path = write(tmp_path, VALID + "training: {mode: t2i}\n")
    config = load_config(path, ["training.mode=t2i", "model.component=ar"], mode="i2i", component="dit")
    assert (config.training.mode, config.model.component) == ("i2i", "dit")


@pytest.mark.parametrize(
    ("component", "said"), [("ar", "train_ar.py, which trains the AR half"), ("both", "--train_both: model.component")]
)
def test_a_part_that_is_not_there_names_what_asked_for_it(tmp_path: Path, component: str, said: str) -> None:
    path = write(tmp_path, "model: {family: sdxl}\ndata: {images: pics}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(path, component=component)


def test_paths_stay_relative_to_the_current_directory(tmp_path: Path) -> None:
    config = load(tmp_path, VALID + "data: {prompts_file: my/prompts.txt, target_images_dir: ~/targets}\n")
    assert config.data.prompts_file == Path("my/prompts.txt")
    assert config.data.target_images_dir == Path.home() / "targets"


def test_config_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, VALID).training.batch_size = 3


def test_importing_the_configuration_is_light() -> None:
    code = (
        "import sys, time; from pydantic import BaseModel, Field, ValidationError, model_validator;"
        "start = time.process_time(); import glm_training.config; spent = time.process_time() - start;"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'numpy') if name in sys.modules], spent)"
    )
    for _ in range(3):  # a busy machine inflates even the processor time
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded, seconds = run.stdout.rsplit(maxsplit=1)
        assert loaded == "[]"
        if float(seconds) < 0.4:
            return
    pytest.fail(f"importing glm_training.config took {seconds} s in each of 3 processes")
