"""`glm-train plan` as it is called: its page, its JSON, and its exit codes."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path

import pytest

from glm_training.cli import main as program
from glm_training.planning.counting import Phase
from glm_training.planning.page import COLUMNS, _phases
from tests.runs import write_config

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/t2i_training.yaml")


def plan(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["glm-train", "plan", *words])
    with pytest.raises(SystemExit) as stop:
        program.main()
    told = capsys.readouterr()
    return int(stop.value.code or 0), told.out, told.err


@pytest.mark.parametrize(
    "words",
    [
        ("--gpu-memory", "24"),
        ("--gpu-memory", "80", "--gpus", "8", "--strategy", "fsdp", "--rate", "0.25"),
        ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false", "--gpu-memory", "80"),
    ],
)
def test_the_page_is_at_most_80_columns_wide(monkeypatch, capsys, words):
    _, out, err = plan(monkeypatch, capsys, CONFIG, *words)
    assert not err and max(map(len, out.splitlines())) <= 80, max(out.splitlines(), key=len)


def test_the_longest_name_of_a_phase_leaves_the_columns_where_they_are():
    names = ("discriminator: forward and backward", "SFT DiT: forward and backward", "autoencoder: optimizer step")
    found = _phases([Phase(name, dict.fromkeys(chain(*COLUMNS.values()), 1e11)) for name in names])
    assert {len(line) for line in found[: 1 + len(names)]} == {80}


def test_a_card_on_which_it_fits_and_one_on_which_it_does_not(monkeypatch, capsys):
    code, out, _ = plan(monkeypatch, capsys, CONFIG, "--gpu-memory", "80")
    assert code == 0 and "it fits: " in out and "what to change" not in out
    code, out, _ = plan(monkeypatch, capsys, CONFIG, "--gpu-memory", "40")
    assert code == 1 and "IT DOES NOT FIT: " in out
    assert out.index("rollout.micro_batch_size=1") < out.index("training.optimizer=adamw_8bit")
    assert "which ship with" in out, "says that the published configurations were taken"


def test_without_a_gpu_nothing_is_said_of_it(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, _ = plan(monkeypatch, capsys, CONFIG)
    assert code == 0 and "name its memory with --gpu-memory" in " ".join(out.split())


def test_json_has_what_the_page_has(monkeypatch, capsys):
    words = (CONFIG, "--gpu-memory", "40", "--rate", "0.1")
    _, page, _ = plan(monkeypatch, capsys, *words)
    code, out, _ = plan(monkeypatch, capsys, *words, "--json")
    told = json.loads(out)
    assert code == 1 and told["card"]["fits"] is False and told["card"]["size"] == 40 * 2**30
    for phase in told["memory"]:
        items = [size for name, size in phase.items() if name not in ("phase", "total")]
        assert sum(items) == pytest.approx(phase["total"])
    assert told["peak"]["total"] == max(phase["total"] for phase in told["memory"])
    assert f"the peak is {told['peak']['total'] / 2**30:.1f} GiB" in page
    assert f"{told['schedule']['days']:.2f} days" in page
    assert {row["part"] for row in told["parameters"]} >= {"ar", "dit", "vae", "text_encoder"}


def test_vgt_has_a_page_as_well(monkeypatch, capsys):
    words = (str(ROOT / "configs/vgt_tiny_ar_pretrain.yaml"), "vgt.autoencoder=tiny", "--gpu-memory", "1.01")
    code, out, err = plan(monkeypatch, capsys, *words)
    assert code == 1 and not err and max(map(len, out.splitlines())) <= 80
    assert "generator: passes" in out and "traced" in out and "training.gradient_checkpointing=true" in out


def test_a_total_has_the_adapters_in_it(monkeypatch, capsys):
    whole = ("lora.enabled=false", "checkpoint.save_lora=false", "checkpoint.save_lora_only=false")
    for words in ((), (*whole, "model.component=dit")):
        _, out, _ = plan(monkeypatch, capsys, CONFIG, *words, "--json")
        rows = {row["part"]: row for row in json.loads(out)["parameters"]}
        assert all(row["total"] == row["trained"] + row["frozen"] for row in rows.values())
    assert rows["dit"]["total"] == rows["dit"]["trained"] == 6_926_882_880
    _, page, _ = plan(monkeypatch, capsys, CONFIG)
    shares = [[float(cell.replace(",", "")) for cell in line.split()[-3:]] for line in page.splitlines()
              if line.startswith(("ar ", "dit ", "all "))]  # fmt: skip
    assert len(shares) == 3 and all(abs(total - trained - frozen) < 0.11 for total, trained, frozen in shares)
    assert shares[0][0] > 8_914.8, "the AR half's adapters are counted"


def test_what_cannot_be_planned(monkeypatch, capsys, tmp_path):
    code, _, err = plan(monkeypatch, capsys, CONFIG, "model.name=nobody/nothing")
    assert code == 2 and "not in the local cache" in err
    tiny = (str(ROOT / "configs/vgt_tiny_ar_pretrain.yaml"), f"vgt.autoencoder={tmp_path}/none")
    code, _, err = plan(monkeypatch, capsys, *tiny)
    assert code == 2 and "vgt.autoencoder=tiny" in err
    code, _, err = plan(monkeypatch, capsys, CONFIG, "training.batch_size=0")
    assert code == 2 and "training.batch_size" in err


def test_the_rate_of_the_runs_own_log_is_taken(monkeypatch, capsys, tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "run").mkdir()
    lines = [{"step": 1, "images_per_second": 1.0}, {"step": 2, "images_per_second": 4.0}, {"step": 3, "eval/x": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "images_per'
    (tmp_path / "run" / "metrics.jsonl").write_text(text, encoding="utf-8")
    _, out, _ = plan(monkeypatch, capsys, str(path), "--json", "--gpus", "2")
    told = json.loads(out)
    assert told["rate"]["images per second and GPU"] == 2.0 and "metrics.jsonl" in told["rate"]["origin"]


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if "vgt" not in path.name)
)
def test_every_shipped_configuration_of_the_families_can_be_planned(monkeypatch, capsys, name):
    monkeypatch.chdir(ROOT)
    code, out, err = plan(monkeypatch, capsys, f"configs/{name}", "--gpu-memory", "100000")
    assert code == 0 and not err and "it fits" in out
