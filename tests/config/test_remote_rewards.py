"""The section reward.options.remote: names of the user's with a section each, checked like any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.config import ConfigError, config_diff, load_config, resolved_yaml

GOOD = """\
reward:
  metrics: {remote/judge: 1.0, aesthetic: 0.5}
  options:
    remote:
      judge: {url: "http://127.0.0.1:9", send: [source]}
"""
BAD = """\
reward:
  metrics: {aesthetic: 0.5}
  options:
    remote:
      judge: {url: "http://me:hunter2@host", timeout_second: 3, retries: -1}
      jury: {send: [mask], url: "http://h/?key=hunter2"}
      other: {batch_size: 2}
      five: 5
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_overrides_reach_below_a_name(tmp_path):
    path = write(tmp_path, GOOD)
    config = load_config(path, ["reward.options.remote.judge.retries=9", "reward.options.remote.b.url=http://b"])
    remote = config.reward.options.remote
    assert (remote["judge"].retries, remote["judge"].send, remote["b"].url) == (9, ["source"], "http://b")
    copy = write(tmp_path, resolved_yaml(config))
    assert load_config(copy) == config


def test_every_fault_is_named_with_its_line_and_no_secret_is_shown(tmp_path):
    text = problems(write(tmp_path, BAD))
    for part in (
        "run.yaml:5: reward.options.remote.judge.url: 'http://***@host' is not allowed; allowed: `http(s)://host[:port]",
        "run.yaml:5: reward.options.remote.judge.retries: -1 is not allowed; allowed: integer >= 0 and <= 1000000.",
        "unknown key. Did you mean `reward.options.remote.judge.timeout_seconds`?",
        "run.yaml:6: reward.options.remote.jury.url: 'http://h/?key=***'",
        "run.yaml:6: reward.options.remote.jury.send: 'mask' is not allowed; allowed: list of `target` and `source`.",
        "run.yaml:7: reward.options.remote.other.url: missing; allowed: `http(s)://host",
        "run.yaml:8: reward.options.remote.five: 5 is not allowed; allowed: a section with the keys url, send,",
    ):
        assert part in text, text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("remote/juge", "`reward.options.remote` has no `juge`. Did you mean `remote/judge`?"),
        ("remote:judge", "`remote:judge` is no metric. Did you mean `remote/judge`?"),
        ("remote/zzzzzzzz", "Give its address: `reward.options.remote.zzzzzzzz.url`."),
        ("clip_scor", "Did you mean `clip_score`?"),
    ],
)
def test_a_metric_that_is_not_there(tmp_path, metric, hint):
    path = write(tmp_path, GOOD.replace("remote/judge: 1.0", f'"{metric}": 1.0'))
    assert hint in problems(path)
    listed = problems(path, f"reward.metrics=['{metric}']", f"reward.weights={{'{metric}': 1.0}}")
    assert hint in listed


def test_only_what_scores_depend_on_is_drift(tmp_path):
    path = write(tmp_path, GOOD)
    key = "reward.options.remote.judge"
    before, patient = load_config(path), load_config(path, [f"{key}.timeout_seconds=9", f"{key}.batch_size=1"])
    assert config_diff(before, patient) == []
    (line,) = config_diff(before, load_config(path, [f"{key}.url=http://elsewhere"]))
    assert line.startswith("reward.options.remote: ") and "http://elsewhere" in line


def test_sending_targets_needs_targets(tmp_path):
    config = load_config(write(tmp_path, GOOD.replace("[source]", "[target]")), ["data.target_images_dir=x"])
    assert config.target_reason() == "the metric `remote/judge` is sent target images"
    assert load_config(write(tmp_path, GOOD)).target_reason() is None
