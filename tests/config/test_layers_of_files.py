"""Several files: later ones win key by key, and messages name the file a key is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from glm_training.config import ConfigError, load_config

BASE = "reward:\n  metrics: {structure: 1.0, lpips: 2.0}\n  target_images_dir: here\n  grpo:\n    kl_coef: 0.5\n"
TOP = "reward:\n  metrics: {structure: 3.0}\n  grpo:\n    ratio_level: sequence\n    clip_range: CLIP\n"


def written(folder: Path, base: str, top: str) -> list[Path]:
    paths = [folder / "base.yaml", folder / "top.yaml"]
    for path, text in zip(paths, (base, top), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_sections_merge_and_leaves_are_replaced(tmp_path):
    config = load_config(written(tmp_path, BASE, TOP.replace("CLIP", "1e-3")), ["reward.grpo.clip_range=0.3"])
    assert config.reward.metric_weights() == {"structure": 3.0}
    assert (config.reward.grpo.kl_coef, config.reward.grpo.ratio_level) == (0.5, "sequence")
    assert config.reward.grpo.clip_range == 0.3
    assert config.output_dir == Path("runs/base-top")


def test_messages_name_the_file_and_line_that_count(tmp_path):
    paths = written(tmp_path, BASE.replace("kl_coef: 0.5", "kl_coef: -1"), TOP.replace("CLIP", "-1"))
    with pytest.raises(ConfigError) as caught:
        load_config(paths)
    assert f"{paths[0]}:5: reward.grpo.kl_coef" in str(caught.value)
    assert f"{paths[1]}:5: reward.grpo.clip_range" in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_the_problems_of_the_other(tmp_path):
    paths = written(tmp_path, BASE, "")
    with pytest.raises(ConfigError, match="absent.yaml: there is no such file"):
        load_config([paths[0], tmp_path / "absent.yaml"])


def test_a_misspelt_file_is_told_with_the_nearest(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    paths = written(tmp_path, BASE, "")
    (tmp_path / "configs" / "mine.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    misspelt = f"{paths[0].stem}s.yaml"
    for given, meant in (
        ("mine.yaml", "configs/mine.yaml"),
        ("configs/mien.yaml", "configs/mine.yaml"),
        (misspelt, paths[0].name),
    ):
        with pytest.raises(ConfigError, match=rf"{given}: there is no such file.* Did you mean `{meant}`\?"):
            load_config(given)
    with pytest.raises(ConfigError, match=r"current directory is `[^`]*`\.$"):
        load_config("xyzzy.yaml")


def test_a_section_without_keys_says_nothing(tmp_path):
    config = load_config(written(tmp_path, BASE, "reward:\n  # metrics: {lpips: 1}\n  grpo:\ntraining:\n"))
    assert config.reward.metric_weights() == {"structure": 1.0, "lpips": 2.0}
    assert config.reward.grpo.kl_coef == 0.5
