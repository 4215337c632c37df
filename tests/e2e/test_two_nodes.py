"""Two nodes, here two launchers on one machine, train one model together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.warm import free_port

ROOT = Path(__file__).parents[2]


def test_two_launchers_meet(tmp_path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    run = [f"output_dir={tmp_path}/run", "training.max_steps=2", "logging.log_images=false", "dmdr.update_ratio=1"]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node-rank={rank}"),
                *("train.py", "--config", "configs/sdxl_dmdr_cold_start_tiny.yaml", *run),
            ],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(told)
    assert "on 2 processes" in told[0] and "step 2/2" in told[0] and "step 2/2" not in told[1]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2
    assert (tmp_path / "run/checkpoints/step-000002/manifest.json").is_file()
