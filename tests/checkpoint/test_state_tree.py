import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from glm_training.checkpoint.state_tree import (
    CheckpointError,
    EncodedTree,
    encode,
    gather_shards,
    load_optimizer_state_tree,
    optimizer_state_tree,
    read_tree,
    shard_like,
    structure_bytes,
)
from glm_training.utils.tensor_file import tensor_file_chunks


def through_files(tree, folder):
    encoded = encode(tree)
    (folder / "tree.json").write_bytes(structure_bytes(encoded))
    (folder / "tree.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in tensor_file_chunks(encoded.tensors)))
    return read_tree(folder / "tree.json", folder / "tree.safetensors" if encoded.tensors else None)


def assert_same(left, right, path="tree"):
    assert type(left) is type(right) or isinstance(left, torch.Tensor), path
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape, path
        as_bytes = [tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
        assert torch.equal(*as_bytes), path
    elif isinstance(left, dict):
        assert list(left) == list(right) and [type(key) for key in left] == [type(key) for key in right], path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}.{index}")
    else:
        assert left == right or (left != left and right != right), path


def test_every_kind_of_leaf_comes_back(tmp_path):
    base = torch.arange(12, dtype=torch.float32)
    tree = {
        "none": None, "true": True, "big": 2**70, "negative": -3, "float": 0.1 + 0.2, "nan": float("nan"),
        "inf": [float("inf"), -float("inf")], "text": "é\n\"", "tuple": (1, (2.0, [])), "empty": {},
        "ints": {0: "zero", 10: {"a": torch.ones(1)}, 2: None}, "mixed": {1: "int", "1": "str"},
        "$tensor": "not a tensor", "scalar": torch.tensor(1.5), "zero": torch.zeros(0, 3), "bf16": base.bfloat16(),
        "bool": torch.tensor([True, False, True]), "u8": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "i64": torch.tensor([2**60]), "f64": torch.tensor([1 / 3], dtype=torch.float64), "half": base.half(),
        "complex": torch.tensor([1 + 2j]), "conjugate": torch.tensor([1 + 2j]).conj(), "f8": base.to(torch.float8_e5m2),
        "view": base[2:5], "strided": base.reshape(3, 4).t(), "nan_tensor": torch.tensor([float("nan"), -0.0]),
        "__metadata__": torch.ones(2), "a.b": torch.ones(3), "a": {"b": torch.full((2,), 7.0)},
    }  # fmt: skip
    assert_same(tree, through_files(tree, tmp_path))


def test_a_single_element_of_a_wider_tensor_is_stored(tmp_path):
    column = torch.arange(4.0).view(1, 4)[:, 2]
    assert column.stride() == (4,) and column.is_contiguous()
    assert torch.equal(through_files({"scores": column}, tmp_path)["scores"], torch.tensor([2.0]))


def test_stock_safetensors_reads_the_tensor_file(tmp_path):
    tree = {"byte": torch.tensor([1], dtype=torch.uint8), "w": {"x": torch.randn(3, 5, generator=torch.Generator())}}
    through_files(tree, tmp_path)
    stock = load_file(tmp_path / "tree.safetensors")
    assert torch.equal(stock["w.x"], tree["w"]["x"]) and torch.equal(stock["byte"], tree["byte"])


@pytest.mark.parametrize("tree", [torch.ones(2), 3, [], "text"])
def test_a_leaf_alone_is_a_tree(tree, tmp_path):
    assert_same(tree, through_files(tree, tmp_path))


def test_a_tied_tensor_is_stored_once_and_overlapping_views_apart(tmp_path):
    weight = torch.arange(6.0)
    tree = {"a": weight, "b": weight, "head": weight[:3], "tail": weight[2:]}
    assert encode(tree).tensor_bytes == (6 + 3 + 4) * 4
    loaded = through_files(tree, tmp_path)
    assert loaded["a"] is loaded["b"]
    assert_same(tree, loaded)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": [1, object()]}, r"a\.1 holds a builtins\.object"),
        ({"a": {1.5: 2}}, r"a has the key 1\.5"),
        ({True: 2}, r"the tree has the key True"),
        ({"s": torch.ones(2, 2).to_sparse()}, r"s is torch\.sparse_coo"),
        ({"c": torch.ones(1, dtype=torch.complex128)}, r"c is .*complex128"),
    ],
)
def test_what_cannot_be_stored_is_named(tree, words):
    with pytest.raises(CheckpointError, match=words):
        encode(tree)


def test_files_that_do_not_fit_are_an_error(tmp_path):
    through_files({"a": torch.ones(2)}, tmp_path)
    (tmp_path / "tree.json").write_text(json.dumps({"a": {"$tensor": "other"}}))
    with pytest.raises(CheckpointError, match="other"):
        read_tree(tmp_path / "tree.json", tmp_path / "tree.safetensors")


def test_tensors_are_aligned_to_their_elements():
    """A reader may map the file: an fp64 tensor must not start at an odd byte."""
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1).bfloat16(), "c": torch.ones(1).double()}
    head = bytes(next(tensor_file_chunks(tensors)))
    assert len(head) % 8 == 0
    for name, record in json.loads(head[8:]).items():
        assert record["data_offsets"][0] % tensors[name].element_size() == 0


def test_only_one_tensor_is_copied_at_a_time():
    encoded = EncodedTree(None, {"a": torch.ones(4), "b": torch.ones(4)})
    assert [len(chunk) for chunk in tensor_file_chunks(encoded.tensors)][1:] == [16, 16]


def trained_optimizer(kind, dtype, steps):
    parameters = {f"p{n}": torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=dtype)) for n in (3, 5)}
    first, second = parameters.values()
    optimizer = kind([{"params": [first], "lr": 0.1}, {"params": [second]}], lr=0.01)
    advance(optimizer, range(steps))
    return optimizer, parameters


def advance(optimizer, steps):
    for step in steps:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.sin(torch.arange(parameter.numel()) + step).to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_for_bit(kind, tmp_path):
    straight, expected = trained_optimizer(kind, torch.float32, 7)
    first, weights = trained_optimizer(kind, torch.float32, 4)
    state = {"optimizer": optimizer_state_tree(first, weights), "weights": [*weights.values()]}
    loaded = through_files(state, tmp_path)
    assert loaded["optimizer"]["optimizer"] == kind.__name__
    second, parameters = trained_optimizer(kind, torch.float32, 0)
    load_optimizer_state_tree(second, parameters, loaded["optimizer"])
    with torch.no_grad():
        for parameter, weight in zip(parameters.values(), loaded["weights"], strict=True):
            parameter.copy_(weight)
    advance(second, range(4, 7))
    for name, wanted in expected.items():
        assert torch.equal(parameters[name], wanted)
    assert_same(optimizer_state_tree(straight, expected), optimizer_state_tree(second, parameters))


def test_the_state_of_a_parameter_is_found_by_its_name():
    """In other groups, another order, or as torch numbers it: each moment goes back to its own parameter."""
    first, weights = trained_optimizer(torch.optim.AdamW, torch.float32, 2)
    wanted = {name: first.state[parameter]["exp_avg"].clone() for name, parameter in weights.items()}
    for tree in (optimizer_state_tree(first, weights), first.state_dict()):
        parameters = {f"p{n}": torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)}
        second = torch.optim.AdamW([parameters["p5"], parameters["p3"]])
        load_optimizer_state_tree(second, parameters, tree)
        for name, parameter in parameters.items():
            assert torch.equal(second.state[parameter]["exp_avg"], wanted[name]), name


def test_hyperparameters_are_those_of_the_optimizer_that_goes_on():
    first, weights = trained_optimizer(torch.optim.AdamW, torch.float32, 2)
    options = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4}
    for tree in (optimizer_state_tree(first, weights), first.state_dict()):
        parameters = {f"p{n}": torch.nn.Parameter(torch.zeros(n)) for n in (3, 5)}
        second = torch.optim.AdamW(parameters.values(), **options)
        load_optimizer_state_tree(second, parameters, tree)
        assert {key: second.param_groups[0][key] for key in options} == options


def test_wide_moments_of_narrow_parameters_are_not_rounded():
    first, parameters = trained_optimizer(torch.optim.AdamW, torch.bfloat16, 2)
    for parameter in parameters.values():
        first.state[parameter]["exp_avg"] = torch.full(parameter.shape, 1 / 3)
    second, others = trained_optimizer(torch.optim.AdamW, torch.bfloat16, 0)
    load_optimizer_state_tree(second, others, optimizer_state_tree(first, parameters))
    moment = second.state[others["p3"]]["exp_avg"]
    assert moment.dtype == torch.float32 and moment[0].item() == torch.tensor(1 / 3).item()


def test_a_loaded_optimizer_shares_nothing_with_the_tree():
    first, weights = trained_optimizer(torch.optim.AdamW, torch.float32, 2)
    second, parameters = trained_optimizer(torch.optim.AdamW, torch.float32, 0)
    tree = optimizer_state_tree(first, weights)
    load_optimizer_state_tree(second, parameters, tree)
    before = {key: value.clone() for key, value in tree["state"]["p3"].items()}
    advance(second, range(2))
    for key, value in before.items():
        assert torch.equal(tree["state"]["p3"][key], value), key


def test_state_that_is_not_of_these_parameters_is_refused():
    first, weights = trained_optimizer(torch.optim.AdamW, torch.float32, 1)
    parameters = {"p3": torch.nn.Parameter(torch.ones(3))}
    other = torch.optim.AdamW(parameters.values())
    with pytest.raises(CheckpointError, match="1 parameter not trained here, first p5"):
        load_optimizer_state_tree(other, parameters, optimizer_state_tree(first, weights))
    with pytest.raises(CheckpointError, match="is of 2 parameters, and 1 here"):
        load_optimizer_state_tree(other, parameters, first.state_dict())


def test_the_state_of_another_class_is_refused_by_name():
    first, weights = trained_optimizer(torch.optim.AdamW, torch.float32, 1)
    second, parameters = trained_optimizer(torch.optim.SGD, torch.float32, 0)
    with pytest.raises(CheckpointError, match="the optimizer AdamW, from which this run's SGD cannot go on"):
        load_optimizer_state_tree(second, parameters, optimizer_state_tree(first, weights))


def sharded_optimizer(mesh, steps):
    whole = {"a": torch.arange(15.0).view(5, 3), "b": torch.linspace(0, 1, 5)}
    parameters = {k: torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for k, value in whole.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    advance_sharded(optimizer, range(steps))
    return optimizer, parameters


def advance_sharded(optimizer, steps):
    for step in steps:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.sin(parameter.detach() + step)
        optimizer.step()


def check_shards(rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    _, wanted = sharded_optimizer(mesh, 4)
    first, weights = sharded_optimizer(mesh, 2)
    with pytest.raises(CheckpointError, match="weights.a is sharded.*gather_shards"):
        encode({"weights": weights})
    tree = gather_shards({"weights": weights, "optimizer": optimizer_state_tree(first, weights)})
    assert encode(tree).tensors["weights.a"].shape == (5, 3) and type(tree["weights"]["a"]) is torch.Tensor
    assert gather_shards([*weights.values()], keep=False)[0].numel() == 0
    second, parameters = sharded_optimizer(mesh, 0)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(tree["weights"][name], parameter))
    load_optimizer_state_tree(second, parameters, tree["optimizer"])
    advance_sharded(second, range(2, 4))
    for name, parameter in parameters.items():
        assert torch.equal(parameter.to_local(), wanted[name].to_local())
    dist.destroy_process_group()


def test_sharded_state_is_gathered_whole_and_sharded_again(tmp_path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=check_shards, args=(rank, tmp_path / "meeting")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_gathering_leaves_unsharded_trees_as_they_are():
    tree = {"a": [torch.ones(2), (1, None)], 3: "x"}
    assert_same(tree, gather_shards(tree))
