"""Two nodes, here two launchers on one machine, train one model together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = {"sdxl_dpo_lora_tiny": ["training.batch_size=2"], "sdxl_dmdr_cold_start_tiny": ["dmdr.update_ratio=1"]}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_two_launchers_meet(tmp_path, name) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    run = [f"output_dir={tmp_path}/run", "training.max_steps=2", "logging.log_images=false", *CONFIGS[name]]
    nodes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node-rank={rank}"),
                *("train.py", "--config", f"configs/{name}.yaml", *run),
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
