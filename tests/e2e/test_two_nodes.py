"""Two nodes, here two launchers on one machine, train one model together by the recipe of `examples/cluster`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.warm import free_port

ROOT = Path(__file__).parents[2]


def test_two_launchers_meet(tmp_path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HEAD": "localhost", "NODES": "2", "WORKERS": "1", "PORT": str(free_port())}
    run = [f"output_dir={tmp_path}/run", "training.max_steps=2", "logging.log_images=false", "dmdr.update_ratio=1"]
    nodes = [
        subprocess.Popen(
            [ROOT / "examples/cluster/torchrun.sh", "configs/sdxl_dmdr_cold_start_tiny.yaml", *run],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(told)
    first, second = sorted(told, key=lambda text: "step 2/2" not in text)  # who is first they find out themselves
    assert "on 2 processes" in first and "step 2/2" in first and "step 2/2" not in second
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2
    assert (tmp_path / "run/checkpoints/step-000002/manifest.json").is_file()
