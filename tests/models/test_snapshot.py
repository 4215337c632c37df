"""Snapshots stand in for parameters inside a block, and leave no trace."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from glm_training.models.snapshot import ParameterSnapshot


@pytest.fixture
def model() -> torch.nn.Linear:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    return model


def fill(model: torch.nn.Linear, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def test_applied_swaps_and_restores(model):
    snapshot = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    own, parameter = model.weight.data_ptr(), model.weight
    with snapshot.applied():
        assert model.weight is parameter and model.weight.eq(1).all() and model.bias.eq(1).all()
        assert not torch.is_grad_enabled()
        assert model(torch.ones(1, 3)).tolist() == [[4, 4]]
    assert torch.is_grad_enabled()
    assert model.weight.data_ptr() == own and model.weight.eq(5).all() and model.bias.eq(5).all()
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None


def test_autocast_computes_with_the_weights_of_the_moment(model):
    """Inside one autocast region, which keeps its bf16 copies of the weights by parameter; all numbers are exact."""
    snapshot = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(1, 3)).tolist() == [[20, 20]]
        with snapshot.applied(), torch.enable_grad():
            assert model(torch.ones(1, 3)).tolist() == [[4, 4]]
        assert model(torch.ones(1, 3)).tolist() == [[20, 20]]


def test_only_the_given_parameters_are_copied_and_swapped(model):
    snapshot = ParameterSnapshot({"bias": model.bias})
    fill(model, 5.0)
    assert list(snapshot.state_dict()) == ["bias"]
    with snapshot.applied():
        assert model.weight.eq(5).all() and model.bias.eq(1).all()
    with pytest.raises(ValueError, match="no parameters"):
        ParameterSnapshot([])


def test_exception_inside_restores(model):
    snapshot = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    with pytest.raises(KeyError), snapshot.applied():
        raise KeyError("x")
    assert model.weight.eq(5).all()
    with snapshot.applied():  # and it is usable again
        assert model.weight.eq(1).all()


def test_what_was_swapped_out_stays_as_it_is(model):
    snapshot, other = ParameterSnapshot(model.parameters()), ParameterSnapshot([model.bias])
    separate = ParameterSnapshot([model.weight])
    fill(model, 5.0)
    with snapshot.applied():
        for misuse in (lambda: snapshot.update(0.5), other.copy_from_current):
            with pytest.raises(RuntimeError, match="swapped out"):
                misuse()
    assert model.weight.eq(5).all() and model.bias.eq(5).all()
    assert snapshot.state_dict()["1"].eq(1).all()
    with other.applied(), separate.applied():  # different parameters may be swapped at once
        assert model.weight.eq(1).all() and model.bias.eq(1).all()
    assert model.weight.eq(5).all() and model.bias.eq(5).all()


def test_a_reference_is_asked_inside_an_average(model):
    reference = ParameterSnapshot([model.bias])
    fill(model, 3.0)
    average = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    with average.applied():
        for _ in range(2):
            with reference.applied():
                assert model.weight.eq(3).all() and model.bias.eq(1).all()
            assert model.bias.eq(3).all()
            with pytest.raises(RuntimeError, match="swapped out"):  # still, though the inner block is left
                reference.copy_from_current()
    assert model.weight.eq(5).all() and model.bias.eq(5).all()
    assert reference.state_dict()["0"].eq(1).all() and average.state_dict()["1"].eq(3).all()
    average.copy_from_current()


def test_update_is_an_exponential_average(model):
    snapshot = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    snapshot.update(0.75)
    assert snapshot.state_dict()["0"].eq(2).all()  # 0.75 * 1 + 0.25 * 5
    snapshot.update(1.0)
    assert snapshot.state_dict()["0"].eq(2).all()
    snapshot.update(0.0)
    assert snapshot.state_dict()["0"].eq(5).all()
    assert model.weight.eq(5).all()
    with pytest.raises(ValueError, match="decay"):
        snapshot.update(1.5)


def test_copy_is_independent_of_the_model(model):
    snapshot = ParameterSnapshot(model.parameters())
    fill(model, 5.0)
    assert snapshot.state_dict()["0"].eq(1).all()
    snapshot.copy_from_current()
    fill(model, 7.0)
    assert snapshot.state_dict()["0"].eq(5).all()


def test_fp32_average_of_bf16_parameters_keeps_small_updates():
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    fill(model, 1.0)
    snapshot = ParameterSnapshot(model.parameters(), dtype=torch.float32)
    fill(model, 2.0)
    for _ in range(100):
        snapshot.update(0.999)
    assert snapshot.state_dict()["0"].item() == pytest.approx(2 - 0.999**100, abs=1e-5)
    with snapshot.applied():
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.dtype == torch.bfloat16 and model.weight.item() == 2


def test_state_round_trip(model):
    first = ParameterSnapshot(dict(model.named_parameters()))
    fill(model, 5.0)
    second = ParameterSnapshot(dict(model.named_parameters()))
    second.load_state_dict(first.state_dict())
    with second.applied():
        assert model.weight.eq(1).all()
    with pytest.raises(ValueError, match="names differ"):
        second.load_state_dict({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="shape"):
        second.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})


def test_sharded_parameters_are_swapped_where_fsdp_gathers_them(model):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="needs `module`"):
            ParameterSnapshot(model.parameters())
        snapshot = ParameterSnapshot(model.parameters(), module=model)
        fill(model, 5.0)
        snapshot.update(0.75)
        assert model(torch.ones(1, 3)).tolist() == [[20, 20]]  # and leaves its weights gathered
        with snapshot.applied():
            assert model(torch.ones(1, 3)).tolist() == [[8, 8]]  # weights of 2
        assert model(torch.ones(1, 3)).tolist() == [[20, 20]]
    finally:
        torch.distributed.destroy_process_group()
