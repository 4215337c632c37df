"""Rollouts drawn apart and joined are what one rollout of all prompts would have been."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glm_training.models.glm_image.ar_types import ARPrompt
from glm_training.models.glm_image.dit_types import DiTCondition, SourceCondition
from glm_training.models.glm_image.family import GLMImage
from glm_training.models.glm_image.joining import join_conditions, join_plans, join_prompts, join_renders
from glm_training.models.glm_image.tiny import build_tiny

SHORT, LONG = ["a"], ['a sign that says "long words" left of a dog', "b"]


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def family() -> GLMImage:
    return GLMImage.from_pipeline(build_tiny())


def plans_of(family, prompts, sources=None, top_p=0.7):
    prompt = family.ar.encode_prompts(prompts, 64, 64, sources)
    uniforms = torch.rand(len(prompts) * 2, prompt.T, generator=torch.Generator().manual_seed(len(prompts)))
    return family.ar.rollout(prompt, 2, uniforms, temperature=0.9, top_p=top_p)


def renders_of(family, prompts, plans, sources=None):
    prompt = plans.prompt
    tokens = None if prompt.source_tokens is None else prompt.source_tokens[::2]
    condition = family.dit.condition(
        prompts, plans.large_tokens, prompt.large_grid, sources, tokens, prompt.source_grid
    )
    rows = len(plans)
    return family.dit.sample(
        rand(rows, 4, 8, 8, seed=rows),
        condition,
        family.dit.schedule(3, 64, 64),
        guidance_scale=1.5,
        kernel="flow",
        sde_indices=(1,),
        step_noise=rand(1, rows, 4, 8, 8, seed=9),
        store=True,
        keep_means=True,
    )


@pytest.mark.parametrize("mode", ["t2i", "i2i"])
@pytest.mark.parametrize("first, second", [(SHORT, LONG), (LONG, SHORT)])
def test_joined_rows_replay_as_they_were_drawn(family, mode, first, second):
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(5)) if mode == "i2i" else None
    parts = [
        (names, None if pictures is None else pictures[: len(names)] + 0.0 * len(names)) for names in (first, second)
    ]
    plans = [plans_of(family, names, sources) for names, sources in parts]
    renders = [renders_of(family, names, drawn, sources) for (names, sources), drawn in zip(parts, plans, strict=True)]
    joined, drawn = join_plans(*plans), join_renders(*renders)
    assert len(joined) == 6 and len(drawn.final) == 6
    replayed = family.ar(joined.prompt, joined.tokens, temperature=joined.temperature, support=joined.support)
    torch.testing.assert_close(replayed, torch.cat([one.log_probs for one in plans]), atol=1e-5, rtol=0)
    rows = torch.tensor([5, 0, 3])
    part = drawn.select(rows)
    times = part.schedule.timesteps[1].expand(3)
    velocity = family.dit(part.at(1), times, part.condition, guidance_scale=1.5)
    log_probs = torch.cat([one.log_probs for one in renders])[rows, 0]
    assert (part.score(1, velocity).log_prob - log_probs).abs().max() < 1e-5
    torch.testing.assert_close(part.mean_at(1), torch.cat([one.mean_at(1) for one in renders])[rows])


def prompt_of(*rows: list[int], first: int) -> ARPrompt:
    """Ids as given; positions count up from `first`, rows and columns 100 and 200 above; one token to write."""
    ids = torch.tensor(rows)
    places = torch.arange(first, first + ids.shape[1]).expand(len(rows), -1)
    return ARPrompt(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.stack([places, places + 100, places + 200]),
        decode_position_ids=torch.full((3, len(rows), 1), first),
        grids=((1, 1),),
        preview_length=0,
        source_tokens=torch.full((len(rows), 2), first),
        source_grid=(1, 2),
    )


@pytest.mark.parametrize("short_first", [True, False])
def test_the_shorter_prompts_are_padded_on_the_left_and_read_nothing_there(short_first):
    short, long = prompt_of([5, 6], [7, 8], first=20), prompt_of([1, 2, 3, 4], first=40)
    joined = join_prompts(*((short, long) if short_first else (long, short)))
    order = [0, 1, 2] if short_first else [2, 0, 1]  # of the rows short, short, long

    def rows(*values):
        return [values[row] for row in order]

    assert joined.input_ids.tolist() == rows([0, 0, 5, 6], [0, 0, 7, 8], [1, 2, 3, 4])
    assert joined.attention_mask.tolist() == rows([0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1])
    for axis, above in enumerate((0, 100, 200)):  # 1 on the padding, as the stock model has it
        padded, whole = [1, 1, 20 + above, 21 + above], [40 + above, 41 + above, 42 + above, 43 + above]
        assert joined.position_ids[axis].tolist() == rows(padded, padded, whole)
        assert joined.decode_position_ids[axis].tolist() == rows([20], [20], [40])
    assert joined.source_tokens is not None and joined.source_tokens.tolist() == rows([20, 20], [20, 20], [40, 40])
    assert (joined.grids, joined.preview_length, joined.source_grid) == (((1, 1),), 0, (1, 2))


def condition_of(*lengths: int, first: int) -> DiTCondition:
    """A row for each number of glyph tokens; row r has prior token and glyphs of first + r and a source of its own."""
    rows, longest = len(lengths), max(lengths)
    numbers = torch.arange(first, first + rows)
    source = SourceCondition(
        latents=numbers.float().view(-1, 1, 1, 1), prior_tokens=numbers[:, None] + 10, grid=(1, 1),
        rows=torch.arange(rows),
    )  # fmt: skip
    return DiTCondition(
        prior_tokens=numbers[:, None],
        grid=(1, 1),
        glyph=numbers.float().view(-1, 1, 1).expand(-1, longest, 2),
        glyph_mask=torch.arange(longest) < torch.tensor(lengths)[:, None],
        height=32,
        width=32,
        source=source,
    )


def test_joined_conditions_pad_their_glyphs_on_the_right_and_keep_their_own_sources():
    joined = join_conditions(condition_of(1, first=1), condition_of(3, 2, first=5))
    assert joined.prior_tokens.tolist() == [[1], [5], [6]]
    assert joined.glyph[..., 0].tolist() == [[1, 0, 0], [5, 5, 5], [6, 6, 6]]
    assert joined.glyph_mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    source = joined.source
    assert source is not None and source.rows.tolist() == [0, 1, 2]
    assert source.latents.flatten().tolist() == [1, 5, 6] and source.prior_tokens.tolist() == [[11], [15], [16]]
    again = join_conditions(condition_of(3, 2, first=5), condition_of(1, first=1))
    assert again.glyph_mask.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert again.source is not None and again.source.rows.tolist() == [0, 1, 2]
    assert again.source.latents.flatten().tolist() == [5, 6, 1]
    for other in (replace(condition_of(1, first=1), source=None), replace(condition_of(1, first=1), grid=(1, 2))):
        with pytest.raises(ValueError, match="do not go into one batch"):
            join_conditions(condition_of(1, first=1), other)
    with pytest.raises(ValueError, match="dropped rows"):
        join_conditions(condition_of(1, first=1), replace(condition_of(1, first=1), dropped=torch.tensor([True])))


def test_what_was_drawn_otherwise_does_not_join(family):
    nucleus, everything = plans_of(family, SHORT), plans_of(family, SHORT, top_p=1.0)
    with pytest.raises(ValueError, match="temperature or top-p"):
        join_plans(nucleus, everything)
    with pytest.raises(ValueError, match="do not go into one batch"):
        join_prompts(family.ar.encode_prompts(SHORT, 64, 64), family.ar.encode_prompts(SHORT, 96, 64))
