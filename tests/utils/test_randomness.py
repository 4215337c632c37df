import subprocess
import sys

import numpy as np
import pytest
import torch

from glm_training.utils.randomness import derive_seed, make_generator, normal, uniform


def test_seeds_are_pinned():
    assert derive_seed(0, "a") == 2115079714466312099
    assert derive_seed(42, "noise", 1, 2, 3) == 3406314081971911349


def test_draws_are_pinned():
    torch.testing.assert_close(
        normal(42, "noise", [(1, 2)], (4,)), torch.tensor([[1.0106, 0.6696, -0.0509, -0.8159]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        uniform(42, "noise", [(1, 2)], (4,)), torch.tensor([[0.6980, 0.3443, 0.0430, 0.3510]]), atol=1e-4, rtol=0
    )


def test_names_do_not_collide():
    names = [
        (1, "a", ()), (1, "a", (0,)), (1, "a", (0, 0)), (1, "a", (1, 2)), (1, "a", (12,)), (1, "a", (-1, 2)),
        (11, "a", ()), (1, "a:", (1, 2)), (1, "a:1", (2,)), (1, "é", ()), (1, "", ()), (0, "a", ()), (-1, "a", ()),
    ]  # fmt: skip
    seeds = {derive_seed(run, purpose, *counters) for run, purpose, counters in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numpy_counters_count_as_integers_and_floats_do_not():
    assert derive_seed(3, "p", np.int64(7)) == derive_seed(3, "p", 7)
    with pytest.raises(TypeError):
        derive_seed(3, "p", 7.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_row_does_not_depend_on_its_batch(draw):
    counters = [(step, row) for step in range(2) for row in range(5)]
    batch = draw(9, "latents", counters, (2, 3, 4))
    assert batch.shape == (10, 2, 3, 4) and batch.dtype == torch.float32
    for position, counter in enumerate(counters):
        assert torch.equal(draw(9, "latents", [counter], (2, 3, 4))[0], batch[position])
    assert len({tuple(row.flatten().tolist()) for row in batch}) == 10


def test_another_process_draws_the_same():
    code = (
        "from glm_training.utils.randomness import *\n"
        "print(derive_seed(5, 'x', 1), normal(5, 'x', [(1,)], (3,)).tolist(), make_generator(5, 'x').initial_seed())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "77", "PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    here = f"{derive_seed(5, 'x', 1)} {normal(5, 'x', [(1,)], (3,)).tolist()} {make_generator(5, 'x').initial_seed()}"
    assert run.stdout.strip() == here


def test_global_generators_are_neither_read_nor_written():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    normal(1, "p", [(0,)], (8,))
    uniform(1, "p", [(0,)], (8,))
    torch.randperm(4, generator=make_generator(1, "p"))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_distributions():
    gaussian = normal(0, "moments", [(row,) for row in range(64)], (8, 16, 16)).double()
    assert abs(gaussian.mean()) < 0.012 and abs(gaussian.std() - 1) < 0.01
    assert abs((gaussian**4).mean() - 3) < 0.1
    flat = uniform(0, "moments", [(row,) for row in range(64)], (2048,)).double()
    assert abs(flat.mean() - 0.5) < 0.004 and abs(flat.var() - 1 / 12) < 0.001
    assert torch.corrcoef(gaussian.flatten(1)[:2])[0, 1].abs() < 0.08


def test_uniform_stays_below_one_in_narrow_dtypes():
    draws = uniform(0, "u", [(0,)], (200_000,), dtype=torch.bfloat16)
    assert draws.dtype == torch.bfloat16 and draws.min() >= 0 and draws.max() < 1


def test_casting_rounds_the_same_numbers():
    wide = normal(1, "p", [(4,)], (16,))
    assert torch.equal(normal(1, "p", [(4,)], (16,), dtype=torch.bfloat16), wide.bfloat16())


def test_no_rows_and_scalar_rows():
    assert normal(0, "p", [], (2, 3)).shape == (0, 2, 3)
    assert normal(0, "p", [(1,), (2,)], ()).shape == (2,)
