"""`kill -9` of one of two workers in the rollout, the update and the save: how soon does the job end, who says why, and
do a restart and a requeue end with the weights of an undisturbed run?

    python -m benchmarks.kill --out benchmarks/results/kill.json
    python -m benchmarks.kill --nodes 2 --deaths update:1:3 -- distributed.backend=gloo

`torchrun` trains the quickstart, small, with `--resume auto`. Each death, `phase:rank:step`, is tried twice: under
`--max-restarts 1`, where torchrun starts both workers again, and without, where the job ends and the same command is
given again, as a scheduler's requeue does. `--nodes 2` has two torchruns with a worker each. What stands behind `--`
goes to the configuration: `-- distributed.strategy=fsdp` has the workers hold shards. Prints one JSON object; exits
with 1 where a death ended otherwise than asked: within 60 s, named on standard error, with the same weights.

seconds: `ended`, from the kill to the end of the job, where nothing is restarted; `started`, from the kill to the first
line of a worker that came after; `whole`, all launches from their start to their end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SMALL = (
    "training.batch_size=1",
    "training.max_steps=4",
    "rollout.plans_per_prompt=2",
    "reward.metrics={objects: 1.0}",
    "reward.dit.weights={objects: 1.0}",
    "logging.save_interval=2",
    "logging.log_images=false",
    "evaluation.enabled=false",
)
DEATHS = ("rollout:0:2", "rollout:1:2", "update:0:3", "update:1:3", "save:0:2", "save:1:2", "save:0:4", "stuck:1:2")
PHASES = {"rollout": ("rollout", "stuck"), "DiT update": ("update",), "saving": ("save",)}
"""Phases of a run, and the deaths in them."""
CALLS = 100
"""Calls of modules into a phase at which the worker dies: in the middle of the model."""
LIMIT_SECONDS = 60.0
CAUSE = re.compile(r"failed \(exitcode: -9\) local_rank: \d+ \(pid: (\d+)\)")
"""torchrun's line on the worker that failed first."""


# -- a worker ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Death:
    """`rank`: who dies, in which `step` from 1 on. `phase`: rollout, save, or update of the DiT half, where the AR
    half's weights have changed already; or stuck: in the rollout, while the others stand still for an hour, as in a
    kernel that waits for the dead."""

    phase: str
    rank: int
    step: int

    @staticmethod
    def parsed(word: str) -> Death:
        """From `phase:rank:step`."""
        phase, rank, step = word.split(":")
        return Death(phase, int(rank), int(step))


def worker(words: Sequence[str]) -> None:
    """A process of the run: `FOLDER DEATH ... -- what train.py takes`. It dies the first of the deaths that nobody has
    died yet, where that is its own; FOLDER keeps count."""
    from glm_training.cli.training import main

    cut = list(words).index("--")
    folder, rank = Path(words[0]), int(os.environ["RANK"])
    (folder / f"start-{rank}-{os.getpid()}").write_text(repr(time.time()))
    to_come = [(number, Death.parsed(word)) for number, word in enumerate(words[1:cut])]
    to_come = [(number, death) for number, death in to_come if not (folder / f"death-{number}").exists()]
    if to_come and (to_come[0][1].rank == rank or to_come[0][1].phase == "stuck"):
        _arrange(to_come[0][1], folder / f"death-{to_come[0][0]}", dies=to_come[0][1].rank == rank)
    sys.argv = ["train.py", *words[cut + 1 :]]
    main()


def _arrange(death: Death, record: Path, *, dies: bool) -> None:
    """Lets this process kill itself in the middle of that phase, or stand still there."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from glm_training.checkpoint import disk
    from glm_training.trainers.base_trainer import BaseTrainer

    def die() -> None:
        while not dies:
            time.sleep(3600)
        record.write_text(json.dumps({"time": time.time(), "pid": os.getpid()}))
        os.kill(os.getpid(), signal.SIGKILL)

    phase, save, sync, write = BaseTrainer.phase, BaseTrainer.save, disk.sync_file, disk.write
    calls, inside = 0, False

    @contextmanager
    def watched(trainer: BaseTrainer, name: Any) -> Iterator[None]:
        nonlocal inside
        step = trainer.step if name == "saving" else trainer.step + 1
        with phase(trainer, name):
            inside = step == death.step and death.phase in PHASES.get(name, ())
            yield
        inside = False

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += inside and death.phase != "save"
        if calls == CALLS:
            die()

    def synced(handle: Any) -> None:
        if inside and death.phase == "save":
            die()  # of the checkpoint's files one is written, and not yet on the disk
        sync(handle)

    def written(handle: Any, data: Any) -> None:
        if inside and death.phase == "save" and death.rank != 0:
            write(handle, memoryview(data)[: len(data) // 2])
            handle.flush()
            die()  # half of a shard is written, while rank 0 waits for all of it
        write(handle, data)

    def saved(trainer: BaseTrainer) -> None:
        whole = trainer.strategy.shards is None
        if death.phase == "save" and death.rank != 0 and whole and trainer.step == death.step:
            die()  # rank 0 writes; this one was about to wait for it
        save(trainer)

    BaseTrainer.phase, BaseTrainer.save = watched, saved  # type: ignore[method-assign, assignment]
    disk.sync_file, disk.write = synced, written
    register_module_forward_pre_hook(counted)


# -- launches ----------------------------------------------------------------------------------------------------------


def launch(folder: Path, deaths: Sequence[str], restarts: int, nodes: int, overrides: Sequence[str]) -> dict[str, Any]:
    """One launch of the run in `folder`, under one torchrun or two: exit codes, standard error, seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(2 // nodes)),
        *("--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-id", "kill"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", __file__, "worker", str(folder), *deaths, "--"),
        *("--config", "configs/quickstart.yaml", "--resume", "auto", f"output_dir={folder}/run", *SMALL, *overrides),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.time()
    group = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(nodes)
    ]
    told = [process.communicate(timeout=600)[1] for process in group]
    return {
        "codes": [process.returncode for process in group],
        "stderr": "".join(told),
        "start": started,
        "end": time.time(),
    }


def weights(folder: Path) -> dict[str, str]:
    """Digests of all files of the last checkpoint that hold tensors, by their names in it: of the tensors alone, as
    the order of a file's notes is left to chance."""
    last = max((folder / "run/checkpoints").glob("step-*"))
    return {str(path.relative_to(last)): tensors_digest(path) for path in sorted(last.rglob("*.safetensors"))} | {
        "step": last.name
    }


def tensors_digest(path: Path) -> str:
    """SHA-256 of the names, types, shapes and bits of a safetensors file's tensors."""
    from safetensors import deserialize

    digest = hashlib.sha256()
    for name, tensor in sorted(deserialize(path.read_bytes())):
        digest.update(f"{name} {tensor['dtype']} {tensor['shape']}\n".encode() + tensor["data"])
    return digest.hexdigest()


def tried(death: str, restarts: int, nodes: int, overrides: Sequence[str], expected: dict[str, str]) -> dict[str, Any]:
    """One death, and what became of the run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launches = [launch(folder, [death], restarts, nodes, overrides)]
        died = json.loads((folder / "death-0").read_text())
        first_end = launches[0]["end"]
        starts = [float(path.read_text()) for path in folder.glob("start-*")]
        if not restarts:
            launches.append(launch(folder, [death], restarts, nodes, overrides))
            starts = [float(path.read_text()) for path in folder.glob("start-*")]
        again = min(time for time in starts if time > died["time"])
        seconds = {"started": again - died["time"], "whole": sum(each["end"] - each["start"] for each in launches)}
        if not restarts:
            seconds["ended"] = first_end - died["time"]
        named = CAUSE.search(launches[0]["stderr"])
        return {
            "death": death,
            "max_restarts": restarts,
            "nodes": nodes,
            "codes": [each["codes"] for each in launches],
            "seconds": {key: round(value, 1) for key, value in seconds.items()},
            "named": named is not None and int(named[1]) == died["pid"],
            "cause": named[0] if named else launches[0]["stderr"][-2000:],
            "same_weights": weights(folder) == expected,
            "ok": _as_asked(launches, restarts, seconds, named, died["pid"]) and weights(folder) == expected,
        }


def _as_asked(
    launches: Sequence[dict[str, Any]], restarts: int, seconds: dict[str, float], named: Any, pid: int
) -> bool:
    last_well = not any(launches[-1]["codes"])
    ended = last_well if restarts else all(launches[0]["codes"])
    soon = seconds["started" if restarts else "ended"] < LIMIT_SECONDS
    return last_well and ended and soon and named is not None and int(named[1]) == pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", nargs="+", default=list(DEATHS), metavar="PHASE:RANK:STEP")
    parser.add_argument("--restarts", nargs="+", type=int, default=[1, 0], choices=(0, 1))
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="further key=value words of the configuration")
    args = parser.parse_args()
    from benchmarks.quickstart import machine

    with tempfile.TemporaryDirectory() as name:
        undisturbed = launch(Path(name), [], 0, args.nodes, args.overrides)
        if any(undisturbed["codes"]):
            sys.exit(undisturbed["stderr"])
        expected = weights(Path(name))
    cases = []
    for death in args.deaths:
        for restarts in args.restarts:
            cases.append(tried(death, restarts, args.nodes, args.overrides, expected))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    report = {
        "benchmark": "kill",
        "machine": machine(),
        "overrides": args.overrides,
        "undisturbed_seconds": round(undisturbed["end"] - undisturbed["start"], 1),
        "cases": cases,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(case["ok"] for case in cases) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2:])
    else:
        main()
