"""Cached drawing against what training reads, and against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glm_training.algorithms.flow_tokens import channel_norm
from glm_training.models.lora import add_lora
from glm_training.models.vgt.generator import Generator
from glm_training.models.vgt.sampling import Writer, sample
from glm_training.models.vgt.sequence import group_sizes, random_orders, raster_order, written
from glm_training.models.vgt.tiny_generator import tiny_random_generator
from tests.models.vgt.generators import PROMPTS, lively_generator, named_noise, own_prompt

ORDERS = random_orders(0, "order", [(row,) for row in range(4)], 16)
LATENTS = named_noise("latents", 4, 4, 4, 4)
TOKENS = written(LATENTS.flatten(2).transpose(1, 2), ORDERS)
"""[4, 16, 4] in the order of writing."""
GROUPS = [1, 3, 4, 16]


def write_all(generator: Generator, tokens: Tensor, acc_ratio: int, *, see: bool = False) -> Tensor:
    """Conditions [B, 16, H] in the order of writing of the first B rows, while `tokens` [B, 16, 4] are written."""
    rows = len(tokens)
    writer = Writer(generator, generator.encode_prompts(PROMPTS[:rows]), ORDERS[:rows], (4, 4))
    conditions = []
    start = 0
    for group in group_sizes(16, acc_ratio):
        conditions.append(writer.conditions(group, queries_see_each_other=see))
        writer.write(tokens[:, start : start + group])
        start += group
    return torch.cat(conditions, dim=1)


def group_of(acc_ratio: int) -> list[int]:
    return [number for number, size in enumerate(group_sizes(16, acc_ratio)) for _ in range(size)]


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call inside."""
    calls: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    yield calls
    hook.remove()


def test_the_cache_changes_nothing() -> None:
    generator = tiny_random_generator()
    with torch.no_grad():
        uncached = written(generator.conditions(generator.encode_prompts(PROMPTS), LATENTS, ORDERS), ORDERS)
        for see in (False, True):
            torch.testing.assert_close(write_all(generator, TOKENS, 1, see=see), uncached, rtol=0, atol=1e-5)
        for acc_ratio in GROUPS:
            groups = group_of(acc_ratio)
            first = [rank for rank in range(16) if rank == 0 or groups[rank] != groups[rank - 1]]
            cached = write_all(generator, TOKENS, acc_ratio)
            torch.testing.assert_close(cached[:, first], uncached[:, first], rtol=0, atol=1e-5)


@pytest.mark.parametrize("see", [False, True])
def test_queries_of_a_group_are_read_as_the_stock_model_would(see: bool) -> None:
    """The stock model over text, pairs written before the group, and the queries it may see, each at the position that
    training gives it; one row, nothing padded, no cache."""
    generator = tiny_random_generator()
    with torch.no_grad():
        cached = write_all(generator, TOKENS, 4, see=see)
        for row in range(4):
            prompts = own_prompt(generator, row)
            text = generator.embed_text(prompts)
            queries, embeddings = (written(grid, ORDERS[row : row + 1]) for grid in generator.grids((4, 4)))
            latents = generator.embed_latents(TOKENS[row : row + 1], embeddings)
            for rank in range(16):
                start = rank // 4 * 4
                tokens, positions = [text], list(range(text.shape[1]))
                for before in range(start):
                    tokens += [queries[:, before : before + 1], latents[:, before : before + 1]]
                    positions += [text.shape[1] + 2 * before, text.shape[1] + 2 * before + 1]
                for query in range(start if see else rank, rank + 1):
                    tokens.append(queries[:, query : query + 1])
                    positions.append(text.shape[1] + 2 * query)
                square = torch.ones(1, 1, len(positions), len(positions), dtype=torch.bool).tril()
                hidden = generator.llm(
                    inputs_embeds=torch.cat(tokens, dim=1),
                    attention_mask=square,
                    position_ids=torch.tensor([positions]),
                    use_cache=False,
                ).last_hidden_state[:, -1]
                torch.testing.assert_close(
                    cached[row : row + 1, rank], generator.condition_out(hidden), rtol=0, atol=1e-5
                )


@pytest.mark.parametrize(("acc_ratio", "see"), [(1, False), (3, False), (3, True), (16, False), (16, True)])
def test_a_cached_query_depends_on_the_groups_before_it_and_on_no_other(acc_ratio: int, see: bool) -> None:
    generator = tiny_random_generator()
    tokens = TOKENS[:2].clone().requires_grad_()
    conditions, groups = write_all(generator, tokens, acc_ratio, see=see), group_of(acc_ratio)
    for row in range(2):
        for rank in range(16):
            wanted = [tokens, generator.queries]
            if groups[rank] == 0:  # nothing is written yet
                wanted = [generator.queries]
            *of_tokens, of_queries = torch.autograd.grad(conditions[row, rank].sum(), wanted, retain_graph=True)
            expected = torch.zeros(2, 16, dtype=torch.bool)
            expected[row] = torch.tensor([group < groups[rank] for group in groups])
            for slope in of_tokens:
                assert torch.equal(slope.abs().sum(2) > 0, expected)
            seen = of_queries[0, :, 2:6, 2:6].abs().sum(0).flatten()[ORDERS[row]] > 0
            fellows = [groups[j] == groups[rank] and (j <= rank if see else j == rank) for j in range(16)]
            assert torch.equal(seen, expected[row] | torch.tensor(fellows))


def noise_only(noise: Tensor) -> Tensor:
    """What two steps under a velocity of 0 make of noise [B, 2, C, h, w]: the score at t = 0 is -x, so the state
    shrinks to .04 and gets sqrt(2 * .96) of the second noise."""
    return 0.04 * noise[:, 0] + 1.92**0.5 * noise[:, 1]


@pytest.mark.parametrize("order", [raster_order(256), random_orders(0, "order", [(0,)], 256)[0]])
def test_each_token_is_written_once_with_one_call_for_each_group(order: Tensor) -> None:
    """The head starts at velocity 0, so that every place must come out as its own noise says."""
    generator = tiny_random_generator(grid=(16, 16), query_grid=16, latent_norm=False)
    noise = named_noise("noise", 2, 2, 4, 16, 16)
    prompts = generator.encode_prompts(["a", "a red circle"])
    # the unconditional rows follow; a query's position is that of its rank in training
    base = torch.cat([prompts.lengths(), generator.encode_prompts(["", ""]).lengths()])
    for acc_ratio, expected in ((1, 256), (16, 16)):
        with calls_of(generator.llm) as calls:
            drawn = sample(generator, prompts, noise, order, acc_ratio=acc_ratio)
        torch.testing.assert_close(drawn, noise_only(noise), rtol=0, atol=1e-5)
        assert len(calls) == expected
        for group, call in enumerate(calls):
            ranks = group * acc_ratio + torch.arange(acc_ratio)
            assert torch.equal(call["position_ids"][:, -acc_ratio:], base + 2 * ranks)


class Spoken(nn.Module):
    """A head whose velocity is what the condition says, whatever the state: one more term in the arithmetic by hand."""

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return 10 * condition[..., : noisy.shape[-1]], condition


@pytest.mark.parametrize("acc_ratio", [1, 4])
@pytest.mark.parametrize("latent_norm", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_drawing_by_hand(acc_ratio: int, latent_norm: bool, guidance: float) -> None:
    """Two steps under a constant velocity v make .04 n0 + v + sqrt(1.92) n1. The conditions are those of the uncached
    model at the first query of each group."""
    generator = tiny_random_generator(latent_norm=latent_norm)
    generator.head = Spoken()
    noise = named_noise("noise", 4, 2, 4, 4, 4)
    drawn = sample(generator, generator.encode_prompts(PROMPTS), noise, ORDERS, guidance=guidance, acc_ratio=acc_ratio)
    prompts, empty = generator.encode_prompts(PROMPTS), generator.encode_prompts([""] * 4)
    groups = group_of(acc_ratio)
    latents, rows = torch.zeros(4, 4, 16), torch.arange(4)
    fresh = noise_only(noise).flatten(2)
    with torch.no_grad():
        for rank in range(16):
            places = ORDERS[:, rank]
            if rank and groups[rank] == groups[rank - 1]:  # its condition is tested above: its latent as it was drawn
                latents[rows, :, places] = drawn.flatten(2)[rows, :, places]
                continue
            grids = latents.view(4, 4, 4, 4)
            spoken = [generator.conditions(text, grids, ORDERS)[rows, places, :4] * 10 for text in (prompts, empty)]
            weight = 1 + (guidance - 1) * (1 - groups[rank] / len(group_sizes(16, acc_ratio)))
            value = fresh[rows, :, places] + spoken[1] + weight * (spoken[0] - spoken[1])
            latents[rows, :, places] = channel_norm(value) if latent_norm else value
    torch.testing.assert_close(drawn.flatten(2), latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"queries_see_each_other": True}])
def test_a_whole_group_is_drawn_under_what_its_queries_are_asked_to_see(options: dict[str, bool]) -> None:
    """By default a query sees none of its group."""
    generator = tiny_random_generator()
    generator.head = Spoken()
    noise, prompts = named_noise("noise", 4, 2, 4, 4, 4), generator.encode_prompts(PROMPTS)
    drawn = sample(generator, prompts, noise, ORDERS, guidance=1.0, acc_ratio=4, **options)
    tokens, fresh = (written(each.flatten(2).transpose(1, 2), ORDERS) for each in (drawn, noise_only(noise)))
    with torch.no_grad():
        spoken = 10 * write_all(generator, tokens, 4, see=bool(options))[..., :4]
    torch.testing.assert_close(tokens, channel_norm(fresh + spoken, dim=-1), rtol=1e-4, atol=1e-4)


def test_without_guidance_the_unconditional_text_is_not_read() -> None:
    generator = lively_generator()
    noise = named_noise("noise", 2, 2, 4, 4, 4)
    for guidance, rows in ((1.0, 2), (1.5, 4)):
        with calls_of(generator.llm) as calls:
            sample(generator, generator.encode_prompts(PROMPTS[:2]), noise, ORDERS[0], guidance=guidance, acc_ratio=8)
        assert [len(call["position_ids"]) for call in calls] == [rows, rows]


@pytest.mark.parametrize("acc_ratio", [1, 4])
def test_a_row_is_its_own_prompt_noise_and_order(acc_ratio: int) -> None:
    generator = lively_generator()
    noise = named_noise("noise", 4, 3, 4, 4, 4)
    together = sample(generator, generator.encode_prompts(PROMPTS), noise, ORDERS, acc_ratio=acc_ratio)
    assert together.dtype == torch.float32 and together.std() > 0.5
    for row in (0, 1):
        chosen = slice(row, row + 1)
        alone = sample(generator, own_prompt(generator, row), noise[chosen], ORDERS[chosen], acc_ratio=acc_ratio)
        torch.testing.assert_close(alone, together[chosen], rtol=0, atol=1e-4)  # 16 tokens, each with what came before
    other = sample(generator, own_prompt(generator, 3), noise[:1], ORDERS[:1], acc_ratio=acc_ratio)
    assert (other - together[:1]).abs().max() > 1e-3, "the prompt counts"


def test_bf16_weights_draw_fp32_latents_and_dropout_rests() -> None:
    generator = lively_generator()
    prompts, noise = generator.encode_prompts(PROMPTS[:2]), named_noise("noise", 2, 3, 4, 4, 4)
    exact = sample(generator, prompts, noise, ORDERS[0])
    add_lora(generator.llm, ["q_proj", "down_proj"], rank=2, alpha=2.0, dropout=0.5)
    for name, param in generator.llm.named_parameters():
        if "lora_B" in name:
            param.data += 0.1
    generator.train()
    first, again = (sample(generator, prompts, noise, ORDERS[0]) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, exact)
    assert generator.training and generator.llm.training
    half = sample(generator.cast(torch.bfloat16), prompts, noise, ORDERS[0])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, first, rtol=0, atol=0.5)  # latents of variance 1, bf16 fed back 16 times


def test_says_where_it_is_and_can_be_abandoned() -> None:
    generator = tiny_random_generator()
    prompts, noise = generator.encode_prompts(["a"]), named_noise("noise", 1, 2, 4, 4, 4)
    groups: list[int] = []
    sample(generator, prompts, noise, ORDERS[0], acc_ratio=4, on_group=groups.append)
    assert groups == [1, 2, 3]

    def stop(group: int) -> None:
        raise KeyboardInterrupt

    with calls_of(generator.llm) as calls, pytest.raises(KeyboardInterrupt):
        sample(generator, prompts, noise, ORDERS[0], on_group=stop)
    assert len(calls) == 1


NOISE = named_noise("noise", 1, 2, 4, 4, 4)


@pytest.mark.parametrize(
    ("noise", "order", "options", "named"),
    [
        (NOISE[:, :, :3], ORDERS[0], {}, r"noise must be \[1, steps, 4, h, w\]"),
        (NOISE.repeat(2, 1, 1, 1, 1), ORDERS[0], {}, "one for each prompt"),
        (NOISE[:, :1], ORDERS[0], {}, "at least 2 steps"),
        (NOISE, torch.zeros(16, dtype=torch.long), {}, "each of the 16 places once"),
        (NOISE, ORDERS[0, :9], {}, r"order must be \[16\]"),
        (NOISE, ORDERS[:2], {}, r"order must be \[16\] or \[1, 16\]"),
        (NOISE, ORDERS[0], {"acc_ratio": 0}, "acc_ratio must be"),
    ],
)
def test_refuses(noise: Tensor, order: Tensor, options: dict[str, int], named: str) -> None:
    generator = tiny_random_generator()
    with pytest.raises(ValueError, match=named):
        sample(generator, generator.encode_prompts(["a"]), noise, order, **options)


def test_latents_that_are_no_numbers_are_an_error() -> None:
    generator = tiny_random_generator()
    generator.head.out.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(generator, generator.encode_prompts(["a"]), NOISE, ORDERS[0])
