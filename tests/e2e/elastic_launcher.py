"""torchrun's agent over two workers that are forks of this process, which has loaded their libraries: `RESTARTS`, and
then what `benchmarks.kill.worker` takes."""

import sys

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import glm_training.trainers.run  # noqa: F401
from benchmarks.kill import worker


def run(*words: str) -> None:
    """A worker. What it returns goes back to the agent, so one that ends well does not exit."""
    try:
        worker(words)
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="killed",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=int(sys.argv[1]),
        start_method="fork",
    )
    elastic_launch(config, run)(*sys.argv[2:])
