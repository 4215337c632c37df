import multiprocessing
import os
import socket

import pytest
import torch
import torch.distributed as dist

from glm_training.utils import distributed
from glm_training.utils.distributed import (
    DistributedError,
    World,
    any_flag,
    barrier,
    broadcast_object,
    gather_objects,
    gather_tensor,
    init_world,
    shutdown,
)

LAUNCH_VARIABLES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
]  # fmt: skip


def use_every_helper(variables, backend):
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    os.environ |= variables
    world = init_world(True, backend, "cpu")
    assert world.world_size == 2 and world.is_main == (world.rank == 0)
    r = world.rank
    rows = torch.arange(4 * (1 + r)).reshape(1 + r, 2, 2) + 100 * r
    assert gather_tensor(world, rows)[:, 0, 0].tolist() == [0, 100, 104]
    assert gather_tensor(world, torch.zeros(r, 3, dtype=torch.bfloat16)).shape == (1, 3)
    assert gather_tensor(world, torch.tensor([r == 0])).tolist() == [True, False]
    assert gather_tensor(world, torch.zeros(r, 0)).shape == (1, 0)
    assert gather_tensor(world, torch.arange(4.0).view(1, 4)[:, r]).tolist() == [0, 1]  # one element, stride 4
    assert gather_objects(world, {"rank": r}) == [{"rank": 0}, {"rank": 1}]
    assert broadcast_object(world, f"from {r}") == "from 0"
    assert any_flag(world, r == 1) and any_flag(world, r == 0) and not any_flag(world, False)
    barrier(world)
    shutdown(world)
    shutdown(world)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def clean_environment(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def run_two(variables, backend: str | None) -> None:
    fork = multiprocessing.get_context("fork")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers = [fork.Process(target=use_every_helper, args=(meeting | variables(rank), backend)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_two_processes_from_torchrun_variables():
    run_two(lambda r: {"RANK": str(r), "WORLD_SIZE": "2", "LOCAL_RANK": str(r)}, "gloo")


def test_two_processes_from_slurm_variables():
    run_two(lambda r: {"SLURM_PROCID": str(r), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(r)}, None)


@pytest.mark.parametrize("backend", [None, "gloo", "nccl"])
def test_one_process_initialises_nothing(clean_environment, backend):
    world = init_world(True, backend, "cpu")
    assert world == World() and world.is_main
    assert gather_tensor(world, torch.arange(3)).tolist() == [0, 1, 2]
    assert gather_objects(world, "x") == ["x"] and broadcast_object(world, "x") == "x"
    assert any_flag(world, True) and not any_flag(world, False)
    barrier(world)
    shutdown(world)
    assert not dist.is_initialized()


def test_several_processes_need_the_key(clean_environment):
    clean_environment.setenv("WORLD_SIZE", "2")
    clean_environment.setenv("RANK", "1")
    clean_environment.setenv("LOCAL_RANK", "1")
    with pytest.raises(DistributedError, match="distributed.enabled: true"):
        init_world(False, "gloo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_nccl_without_cuda_names_gloo(clean_environment):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        clean_environment.setenv(name, {"WORLD_SIZE": "2"}.get(name, "0"))
    with pytest.raises(DistributedError, match="set distributed.backend: gloo"):
        init_world(True, "nccl")


def test_one_certain_gpu_is_for_one_process(clean_environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        clean_environment.setenv(name, {"WORLD_SIZE": "2"}.get(name, "0"))
    with pytest.raises(DistributedError, match="model.device_map is 'cuda:1'.*2 processes.*'cuda' or null"):
        init_world(True, None, "cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_named(clean_environment):
    with pytest.raises(DistributedError, match="model.device_map is 'cuda'.*'cpu' or null"):
        init_world(True, None, "cuda")


def test_incomplete_environment_is_named(clean_environment):
    clean_environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="RANK.*torchrun"):
        init_world(True, "gloo", "cpu")
    clean_environment.setenv("RANK", "0")
    clean_environment.setenv("LOCAL_RANK", "0")
    with pytest.raises(DistributedError, match="MASTER_ADDR"):
        init_world(True, "gloo", "cpu")
    clean_environment.setenv("WORLD_SIZE", "two")
    with pytest.raises(DistributedError, match="'two'"):
        init_world(True, "gloo", "cpu")


def test_unknown_backend_is_refused(clean_environment):
    with pytest.raises(DistributedError, match="'mpi'.*gloo"):
        init_world(True, "mpi", "cpu")


def test_slurm_tasks_without_an_address_do_not_train_apart(clean_environment):
    clean_environment.setenv("SLURM_NTASKS", "4")
    for rank in ("0", "2"):
        clean_environment.setenv("SLURM_PROCID", rank)
        with pytest.raises(DistributedError, match="Slurm started 4 tasks.*export MASTER_ADDR=.*WORLD_SIZE=1"):
            init_world(True, None, "cpu")
    clean_environment.setenv("WORLD_SIZE", "1")  # the way out that the message names
    assert init_world(True, None, "cpu") == World()


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpi_ranks_do_not_train_apart(clean_environment, variable):
    clean_environment.setenv(variable, "2")
    with pytest.raises(DistributedError, match=f"2 processes .{variable}.*torchrun"):
        init_world(True, None, "cpu")


def test_a_rank_outside_the_world_is_named(clean_environment):
    for name, value in {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}.items():
        clean_environment.setenv(name, value)
    with pytest.raises(DistributedError, match="RANK is 2 and WORLD_SIZE 2"):
        init_world(True, None, "cpu")


def test_torchrun_wins_over_slurm(clean_environment):
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "MASTER_ADDR": "h"}.items():
        clean_environment.setenv(name, value)
    assert distributed.read_launch() == distributed.Launch(3, 8, 3, "tcp://h:29500")
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"}.items():
        clean_environment.setenv(name, value)
    assert distributed.read_launch() == distributed.Launch(1, 2, 0, None)


def test_one_process_of_all_nodes_is_the_one_that_writes():
    """Two nodes of two processes each."""
    worlds = [World(rank, 4, local_rank) for rank, local_rank in ((0, 0), (1, 1), (2, 0), (3, 1))]
    assert [world.is_main for world in worlds] == [True, False, False, False]
