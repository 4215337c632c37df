"""What leaves with an export: no secret, no absolute path, no name of a user or host."""

from __future__ import annotations

import json

import pytest
import torch

from glm_training.export import scrub
from glm_training.export.scrub import require_clean, scrub_files, scrubbed, scrubbed_text
from glm_training.export.source import ExportError
from glm_training.utils.tensor_file import write_tensor_file

TOKEN = "hf_" + "Ab3" * 10


@pytest.fixture(autouse=True)
def place(monkeypatch):
    monkeypatch.setattr(scrub, "names_of_this_place", lambda: ["node17.lab", "ada"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/bob/models/glm", ".../glm"),
        ("/home/bob", "..."),
        ("/home/Bob Smith/my models/x", ".../x"),
        ("~/models/x", ".../x"),
        ("C:\\Users\\bob\\x", ".../x"),
        ("C:\\Users\\bob", "..."),
        ("loaded from /data/runs/x, again", "loaded from .../x, again"),
        ("/srv/rewards.py:Brightness", ".../rewards.py:Brightness"),
        ("zai-org/GLM-Image", "zai-org/GLM-Image"),
        ("data/t2i/prompts.txt", "data/t2i/prompts.txt"),
        ("and/or 1/2 w/h", "and/or 1/2 w/h"),
        ("http://10.1.2.3:8000/score", "http://***"),
        ("s3://lab-bucket/pictures", "s3://***"),
        ("file:///home/bob/x", "file://***"),
        ("https://huggingface.co/zai-org/GLM-Image", "https://huggingface.co/zai-org/GLM-Image"),
        ("https://huggingface.co.evil.org/x", "https://***"),
        ("runs/ada/first", "runs/***/first"),
        ("adam, canada", "adam, canada"),
        ("on node17.lab", "on ***"),
        (f"token {TOKEN}", "token ***"),
    ],
)
def test_texts(text, expected):
    assert scrubbed_text(text) == expected


def test_settings(monkeypatch):
    monkeypatch.setenv("SCORER_PASSWORD", "open-sesame-77")
    tree = {
        "name": "/home/bob/m",
        "headers": {"authorization": "Bearer abcdef123456"},
        "weights": [1.0, "/x/y/z"],
        "metrics": {"/home/bob/mine.py:Score": 1.0, "~/x/y.py:Z": 0.5, "clip_score": 0.5},
        "note": "open-sesame-77",
        "seed": 3,
        "on": True,
    }
    assert scrubbed(tree) == {
        "name": ".../m",
        "headers": {"authorization": "***"},
        "weights": [1.0, ".../z"],
        "metrics": {".../mine.py:Score": 1.0, ".../y.py:Z": 0.5, "clip_score": 0.5},
        "note": "***",
        "seed": 3,
        "on": True,
    }


def test_where_libraries_read_from_is_forgotten(tmp_path):
    own = {"_name_or_path": str(tmp_path), "x": {"name_or_path": "/gone/model"}, "kept": "/as/it/is"}
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(own))
    (tmp_path / "model_index.json").write_text(json.dumps({"_name_or_path": "owner/name"}, indent=1))
    scrub_files(tmp_path)
    assert json.loads((tmp_path / "unet/config.json").read_text()) == {"x": {}, "kept": "/as/it/is"}
    assert json.loads((tmp_path / "model_index.json").read_text()) == {"_name_or_path": "owner/name"}


def test_what_would_be_told_stops_the_export(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-a-known-shape")
    home, folder = tmp_path / "runs/mine", tmp_path / "out"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"pad_token":"<|endoftext|>","eos_token":"x1y2z3w4"}')
    require_clean(folder, [home])
    (folder / "config.json").write_text(json.dumps({"from": f"{home}/checkpoints"}))
    (folder / "README.md").write_text(f"made with {TOKEN}")
    (folder / "notes.txt").write_text("login: not-of-a-known-shape")
    write_tensor_file(folder / "x.safetensors", {"a": torch.zeros(1)}, {"where": str(home)})
    with pytest.raises(ExportError) as found:
        require_clean(folder, [home])
    told = str(found.value)
    for name in ("config.json tells", "x.safetensors tells", "README.md holds a secret", "notes.txt holds a secret"):
        assert name in told, told
    assert "tokenizer_config" not in told and TOKEN not in told and "not-of-a-known-shape" not in told
