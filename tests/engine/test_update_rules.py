"""Update rules of torch and of the libraries that keep them: first steps by hand, saved states, what is shown."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from packaging.version import Version

from glm_training.checkpoint.state_tree import (
    CheckpointError,
    decode,
    encode,
    load_optimizer_state_tree,
    optimizer_state_tree,
)
from glm_training.config.sections.resolved import ResolvedOptimizer
from glm_training.engine.optimizers import MUON_MOMENTUM, _adamw_8bit, is_hidden_matrix
from glm_training.engine.parts import Part, WeightAverage, as_shown
from glm_training.models.snapshot import ParameterSnapshot
from glm_training.utils.distributed import World

RATE, DECAY, BETA1, BETA2, EPS = 0.5, 0.25, 0.75, 0.5, 2.0**-10
SETTINGS = ResolvedOptimizer("adamw", RATE, BETA1, BETA2, EPS, DECAY, 0.0, "constant", 0, 0.0)
PACKAGES = {
    "prodigy": "prodigyopt",
    "lion": "lion_pytorch",
    "adamw_schedule_free": "schedulefree",
    "adamw_8bit": "bitsandbytes",
}


def needs(*rules: str) -> pytest.MarkDecorator:
    """On tests of rules whose packages are extras, which the extra `test` brings along."""
    missing = [PACKAGES[rule] for rule in rules if rule in PACKAGES and find_spec(PACKAGES[rule]) is None]
    if "adamw_8bit" in rules and not missing and Version(version("bitsandbytes")) < Version("0.50"):
        missing.append("bitsandbytes 0.50")
    missing += ["torch 2.9"] if "muon" in rules and not hasattr(torch.optim, "Muon") else []
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


def each(*rules: str) -> list:
    return [pytest.param(rule, marks=needs(rule)) for rule in rules]


RULES = each("adamw", "adamw_8bit", "adafactor", "prodigy", "lion", "muon", "adamw_schedule_free", "sgd")
GRADIENT = [[1.0, -2.0, 4.0], [0.5, 8.0, -1.0]]
START = [[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]]
CLOSE = {"rtol": 32 * torch.finfo(torch.float32).eps, "atol": 32 * torch.finfo(torch.float32).eps}


class Toy(torch.nn.Module):
    """A matrix and its bias, an embedding, the kernel of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.embed_tokens = torch.nn.Embedding(2, 3)
        self.conv = torch.nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor(START))
            self.linear.bias.copy_(torch.tensor([1.0, -1.0]))
            self.embed_tokens.weight.copy_(torch.tensor(START))
            self.conv.weight.copy_(torch.tensor([2.0, -3.0])[:, None, None, None])


def part_of(rule: str, **changed) -> Part:
    module = Toy()
    settings = replace(SETTINGS, name=rule, **changed)
    return Part("ar", module, dict(module.named_parameters()), settings, World(), total_steps=10)


def pull(part: Part, scale: float = 1.0, gradient: list[list[float]] = GRADIENT) -> None:
    """Gives every parameter a gradient: the matrix and the embedding `gradient`, the others ones."""
    for parameter in part.parameters.values():
        like = torch.tensor(gradient) if parameter.shape == (2, 3) else torch.ones_like(parameter)
        parameter.grad = scale * like


def first_step(rule: str, **changed) -> dict[str, torch.Tensor]:
    part = part_of(rule, **changed)
    pull(part)
    part.step(0)
    return {name: parameter.detach() for name, parameter in part.parameters.items()}


# -- first steps -------------------------------------------------------------------------------------------------------


@needs("lion")
def test_lion_moves_by_the_sign_of_the_gradient():
    """p (1 - lr decay) - lr sign(g): all powers of two."""
    moved = first_step("lion")
    expected = torch.tensor(START) * (1 - RATE * DECAY) - RATE * torch.tensor(GRADIENT).sign()
    torch.testing.assert_close(moved["linear.weight"], expected, rtol=0, atol=0)
    torch.testing.assert_close(moved["linear.bias"], torch.tensor([0.5, -1.5]), rtol=0, atol=0)


@needs("lion")
def test_lion_weighs_momentum_and_gradient():
    """After g = 1, momentum is 1 - beta2 = 0.5; then g = -1: 0.75 x 0.5 - 0.25 > 0, so it moves on against the new
    gradient."""
    part = part_of("lion")
    for scale in (1.0, -1.0):
        pull(part, scale)
        part.step(0)
    torch.testing.assert_close(part.component.linear.bias.detach(), torch.tensor([0.0, -2.0]), rtol=0, atol=0)


def test_adafactor_factors_the_second_moment_and_clips_the_step():
    """The decay of the first moment is 0 at step 1, so the second moment is g^2 itself, of a matrix as row means x
    column means / mean; the step is scaled to an RMS of 1 at most."""
    gradient = torch.tensor(GRADIENT, dtype=torch.float64)
    square = gradient.square()
    moment = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    update = gradient / moment.sqrt()
    update = update / max(1.0, update.square().mean().sqrt().item())
    expected = torch.tensor(START, dtype=torch.float64) * (1 - RATE * DECAY) - RATE * update
    moved = first_step("adafactor")
    torch.testing.assert_close(moved["linear.weight"].double(), expected, **CLOSE)
    torch.testing.assert_close(moved["linear.bias"], torch.tensor([0.5, -1.5]), **CLOSE)  # of a vector g / |g|
    assert update.square().mean().sqrt().item() == pytest.approx(1.0)  # so the bound is met


@needs("prodigy")
def test_prodigy_begins_with_adams_step_at_its_smallest_size():
    """d = 1e-6 at first: nothing has been moved, so nothing is known of the distance. With the bias corrected Adam's
    first step is g / (|g| + eps), but that eps is compared with the uncorrected root."""
    part = part_of("prodigy", learning_rate=1.0, weight_decay=0.0)
    with torch.no_grad():
        part.component.linear.bias.zero_()  # 1e-6 of a step is lost in a number of 1
    pull(part, 4.0)
    part.step(0)
    corrected = math.sqrt(1 - BETA2) / (1 - BETA1)
    step = 1e-6 * corrected * (1 - BETA1) * 4 / (4 * math.sqrt(1 - BETA2) + EPS)
    torch.testing.assert_close(part.component.linear.bias.detach(), torch.full((2,), -step), rtol=1e-5, atol=0)


@needs("prodigy")
def test_prodigy_grows_its_steps_once_it_knows_the_distance():
    """d is the largest of <g, p0 - p> sums over |s|, and never falls."""
    part = part_of("prodigy", learning_rate=1.0)
    sizes = []
    for step in range(8):
        pull(part)
        figures = part.step(step)
        sizes.append(part.optimizer.param_groups[0]["d"])
        assert figures["found_rate"] == sizes[-1] * figures["learning_rate"]
    assert sizes[0] == 1e-6 and sizes == sorted(sizes) and sizes[-1] > 2e-6


@needs("muon")
def test_muon_makes_the_step_of_a_matrix_orthogonal():
    """Of a gradient of rank one, g = s u v^T, the five Newton-Schulz passes leave p(p(...p(1))) u v^T with
    p(x) = 3.4445 x - 4.775 x^3 + 2.0315 x^5, in bf16; at AdamW's scale it is times 0.2 sqrt(longer side)."""
    part = part_of("muon")
    u, v = torch.tensor([0.6, 0.8]), torch.tensor([2.0, -1.0, 2.0]) / 3
    rank_one = 5 * torch.outer(u, v)
    pull(part, gradient=rank_one.tolist())
    part.step(0)
    left = 1.0
    for _ in range(5):
        left = 3.4445 * left - 4.775 * left**3 + 2.0315 * left**5
    expected = torch.tensor(START) * (1 - RATE * DECAY) - RATE * 0.2 * math.sqrt(3) * left * torch.outer(u, v)
    # five passes of bf16 products that amplify an error up to 3.4-fold while they lift small values
    bound = RATE * 0.2 * math.sqrt(3) * 16 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(part.component.linear.weight.detach(), expected, rtol=0, atol=bound)


@needs("muon")
def test_muon_leaves_vectors_kernels_and_embeddings_to_adamw():
    """AdamW's first step is g / (|g| + eps)."""
    moved, adamw = first_step("muon"), first_step("adamw")
    for name in ("linear.bias", "embed_tokens.weight", "conv.weight"):
        torch.testing.assert_close(moved[name], adamw[name], rtol=0, atol=0)
    expected = torch.tensor([1.0, -1.0]) - RATE / (1 + EPS)
    torch.testing.assert_close(moved["linear.bias"], expected, **CLOSE)
    assert (moved["linear.weight"] - adamw["linear.weight"]).abs().min() > 0.01


def test_what_muon_moves_is_told_by_name_and_dimension():
    matrix, vector, kernel = (torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (2, 2, 1, 1)))
    for name in ("layers.0.self_attn.q_proj.weight", "attn1.to_q.lora_A.default.weight"):
        assert is_hidden_matrix(name, matrix)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "time_embedding.linear_1.weight", "attn.bias"):
        assert not is_hidden_matrix(name, matrix)
    assert not is_hidden_matrix("norm.weight", vector) and not is_hidden_matrix("conv_in.weight", kernel)


@needs("muon")
def test_muon_trains_a_part_without_matrices_and_one_of_matrices_alone():
    for module, count in ((torch.nn.LayerNorm(3), 1), (torch.nn.Linear(3, 2, bias=False), 1)):
        settings = replace(SETTINGS, name="muon")
        part = Part("ar", module, dict(module.named_parameters()), settings, World(), total_steps=2)
        part.backward(sum(parameter.sum() for parameter in part.parameters.values()))
        part.step(0)
        assert len(part.optimizer._inner) == count and len(part.optimizer.state) == len(part.parameters)


@needs("adamw_schedule_free")
def test_schedule_free_averages_what_it_walks_through():
    """Two steps with g = 1 and 1 from p: z1 = p - lr, x1 = z1; y2 = x1 as both are one point, z2 = z1 - lr, x2 their
    mean; the weights under training lie at y = (1 - beta1) z + beta1 x."""
    part = part_of("adamw_schedule_free", weight_decay=0.0, epsilon=1e-30)
    for step in range(2):
        pull(part)
        part.step(step)
    start = torch.tensor([1.0, -1.0])
    newest, mean = start - 2 * RATE, start - 1.5 * RATE
    torch.testing.assert_close(part.component.linear.bias.detach(), (1 - BETA1) * newest + BETA1 * mean, **CLOSE)
    with part.as_shown("evaluation"):
        torch.testing.assert_close(part.component.linear.bias.detach(), mean, **CLOSE)


@needs("adamw_schedule_free")
def test_schedule_free_weighs_steps_by_the_square_of_their_largest_rate():
    """In a warmup of one step the first has half the rate: weights 1/4 and 1, so the mean is 1/5 and 4/5."""
    part = part_of("adamw_schedule_free", weight_decay=0.0, epsilon=1e-30, warmup_steps=1)
    for step in range(2):
        pull(part)
        part.step(step)
    first, second = torch.tensor([1.0, -1.0]) - RATE / 2, torch.tensor([1.0, -1.0]) - RATE * 1.5
    with part.as_shown("export"):
        torch.testing.assert_close(part.component.linear.bias.detach(), 0.2 * first + 0.8 * second, **CLOSE)


@needs("adamw_8bit")
def test_the_moments_of_8_bits_are_adamws_and_go_on_bit_for_bit():
    """Its first step is AdamW's: the moments are rounded after it."""

    def stepped(start: torch.Tensor, steps: range, state=None):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = _adamw_8bit(SETTINGS, [{"params": [parameter], "weight_decay": DECAY}])
        if state is not None:
            load_optimizer_state_tree(optimizer, {"weight": parameter}, state)
        for step in steps:
            parameter.grad = torch.linspace(-4, 4, 8192).view(64, 128) * math.cos(step)
            optimizer.step()
        tree = encode(optimizer_state_tree(optimizer, {"weight": parameter}))
        return parameter.detach(), decode(tree.structure, {name: held.clone() for name, held in tree.tensors.items()})

    start = torch.linspace(-1, 2, 8192).view(64, 128)  # 8 bits are for tensors of 4096 numbers and more
    first, _ = stepped(start, range(1))
    gradient = torch.linspace(-4, 4, 8192).double().view(64, 128)
    expected = start.double() * (1 - RATE * DECAY) - RATE * gradient / (gradient.abs() + EPS)
    torch.testing.assert_close(first.double(), expected, **CLOSE)
    whole, _ = stepped(start, range(6))
    half, state = stepped(start, range(3))
    assert torch.equal(stepped(half, range(3, 6), state)[0], whole)


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_what_was_shown_leaves_no_trace_in_the_training(rule):
    """Bit for bit: evaluations and saves come at the same steps in no two runs."""
    shown, alone = part_of(rule), part_of(rule)
    for step in range(3):
        for part in (shown, alone):
            pull(part, 1.0 + step)
            part.step(step)
        for showing in ("evaluation", "export"):
            with as_shown({"ar": shown}, showing):
                assert torch.is_grad_enabled() == (rule != "adamw_schedule_free")
    for name, parameter in alone.parameters.items():
        torch.testing.assert_close(shown.parameters[name], parameter, rtol=0, atol=0)


@needs("adamw_schedule_free")
def test_a_schedule_free_part_without_a_step_is_shown_as_it_is():
    part = part_of("adamw_schedule_free")
    with part.as_shown("evaluation"):
        assert part.component.linear.weight.tolist() == START


@pytest.mark.parametrize("shown", [(), ("evaluation",), ("export",), ("evaluation", "export")])
def test_the_average_is_shown_where_it_is_asked_for(shown):
    """SGD of rate 0.5 moves the bias from 1 to 0.5; the average, at 0.75, is halfway."""
    part = part_of("sgd", beta1=0.0)
    part.ema = WeightAverage(ParameterSnapshot(part.parameters), decay=0.5, start=0, shown=frozenset(shown))
    pull(part)
    part.step(0)
    for showing in ("evaluation", "export"):
        with as_shown({"ar": part}, showing):
            assert part.component.linear.bias[0].item() == (0.75 if showing in shown else 0.5)
        assert part.component.linear.bias[0].item() == 0.5


# -- resuming ----------------------------------------------------------------------------------------------------------


def saved(part: Part):
    """The part's state as a checkpoint gives it back: through its file format, copied."""
    tree = encode(part.state(with_optimizer=True))
    return decode(tree.structure, {name: tensor.clone() for name, tensor in tree.tensors.items()})


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_part_goes_on_bit_for_bit(rule):
    changed = {"learning_rate": 1.0} if rule == "prodigy" else {}
    whole, half = part_of(rule, **changed), part_of(rule, **changed)
    for step in range(6):
        pull(whole, math.cos(step))
        whole.step(step)
    for step in range(3):
        pull(half, math.cos(step))
        half.step(step)
    resumed = part_of(rule, **changed)
    resumed.load_state(saved(half))
    for step in range(3, 6):
        pull(resumed, math.cos(step))
        resumed.step(step)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(resumed.parameters[name], parameter, rtol=0, atol=0)
    with whole.as_shown("evaluation"), resumed.as_shown("evaluation"):
        for name, parameter in whole.parameters.items():
            torch.testing.assert_close(resumed.parameters[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("rule", each("muon", "prodigy", "adamw_schedule_free"))
@pytest.mark.parametrize("everything", [False, True])
def test_what_a_rule_remembers_finds_its_weights_when_the_groups_change(rule, everything):
    """Decay of biases switched on or off by `resume.accept`: moments, and what is known of whole groups, stay."""
    before = part_of(rule, decay_norms_and_biases=everything)
    for step in range(3):
        pull(before)
        before.step(step)
    after = part_of(rule, decay_norms_and_biases=not everything)
    after.load_state(saved(before))
    for name, parameter in before.parameters.items():
        here = after.optimizer.state[after.parameters[name]]
        for key, value in before.optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(here[key]), torch.as_tensor(value)), (name, key)
    remembered = {"prodigy": ("k", "d", "d_max", "d_numerator"), "adamw_schedule_free": ("k", "lr_max", "weight_sum")}
    for key in remembered.get(rule, ()):
        values = {group[key] for group in before.optimizer.param_groups}
        assert {group[key] for group in after.optimizer.param_groups} == values and values != {0}


def test_a_rule_that_remembers_nothing_of_groups_saves_what_it_always_did():
    part = part_of("adamw")
    pull(part)
    part.step(0)
    assert part.state(with_optimizer=True)["ar_optimizer"].keys() == {"optimizer", "state"}


@needs("muon")
def test_muons_state_is_none_of_adamws():
    before = part_of("muon")
    pull(before)
    before.step(0)
    moments = before.state(with_optimizer=True)["ar_optimizer"]["state"]
    assert moments["linear.weight"].keys() == {"momentum_buffer"}
    gradient = (1 - MUON_MOMENTUM) * torch.tensor(GRADIENT)
    torch.testing.assert_close(moments["linear.weight"]["momentum_buffer"], gradient, **CLOSE)
    assert {"exp_avg", "exp_avg_sq"} <= moments["embed_tokens.weight"].keys()
    with pytest.raises(CheckpointError, match="MuonAdamW.*AdamW"):
        part_of("adamw").load_state(before.state(with_optimizer=True))


# -- loss scaling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_an_overflow_under_loss_scaling_moves_nothing(rule):
    module = Toy()
    settings = replace(SETTINGS, name=rule)
    scaled = Part("ar", module, dict(module.named_parameters()), settings, World(), total_steps=2, loss_scaling=True)
    scaled.backward(sum(parameter.sum() for parameter in scaled.parameters.values()) * math.inf)
    scaled.step(0)
    assert module.linear.weight.tolist() == START and not scaled.optimizer.state
