"""Drawing codes: the kept support, the inverse cumulative distribution, and the packed bits."""

import math

import pytest
import torch
from transformers import TopPLogitsWarper

from glm_training.models.glm_image.token_sampling import (
    TokenSampler,
    chosen_log_probs,
    entropies,
    nucleus,
    pack_support,
    unpack_support,
)


def draw_all(logits, uniforms, *, temperature=1.0, top_p=1.0, do_sample=True):
    """One step per column of `uniforms`, each from `logits` [B, V]."""
    sampler = TokenSampler(uniforms, logits.shape[1], temperature=temperature, top_p=top_p, do_sample=do_sample)
    for _ in range(uniforms.shape[1]):
        sampler.draw(logits)
    return sampler.result()


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.75, 0.99])
@pytest.mark.parametrize("peakedness", [0.3, 3])  # a nucleus of most codes, and one of few
def test_the_support_is_that_of_transformers(top_p, peakedness):
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)) * peakedness
    expected = TopPLogitsWarper(top_p)(None, logits.clone()).isfinite()
    assert torch.equal(nucleus(logits.softmax(-1), top_p), expected)


def test_equally_probable_codes_share_their_fate():
    probabilities = torch.tensor([[0.5, 0.125, 0.125, 0.125, 0.125]])
    assert nucleus(probabilities, 0.5).tolist() == [[True, False, False, False, False]]
    assert nucleus(probabilities, 0.6).tolist() == [[True] * 5]


@pytest.mark.parametrize("num_codes", [8, 64, 61, 3])
def test_packing_gives_the_support_back(num_codes):
    support = torch.rand(5, 7, num_codes, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack_support(support)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 7, -(-num_codes // 8))
    assert torch.equal(unpack_support(packed, num_codes), support)
    assert packed[0, 0, 0] == sum(int(bit) << i for i, bit in enumerate(support[0, 0, :8]))


def test_a_uniform_picks_the_code_whose_interval_holds_it():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    uniforms = torch.tensor([[0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.99999]])
    tokens, log_probs, support = draw_all(logits, uniforms)
    assert tokens.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    torch.testing.assert_close(log_probs, logits[0, tokens])
    assert support is None


def test_top_p_renormalises_over_what_it_keeps():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    tokens, log_probs, support = draw_all(logits, torch.tensor([[0.0, 0.42, 0.44, 0.999]]), top_p=0.65)
    assert tokens.tolist() == [[2, 2, 3, 3]]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[3 / 7, 3 / 7, 4 / 7, 4 / 7]]))
    assert unpack_support(support, 4).tolist() == [[[False, False, True, True]] * 4]


def test_temperature_divides_the_logits_before_top_p():
    logits = torch.tensor([[1.0, 0.0]])
    _, log_probs, support = draw_all(logits, torch.zeros(1, 1), temperature=0.1, top_p=0.9)
    assert unpack_support(support, 2).tolist() == [[[True, False]]]  # e^10 : 1, where temperature 1 would keep both
    assert log_probs.item() == pytest.approx(0, abs=1e-6)


def test_scores_of_given_codes_by_hand():
    """Probabilities 1/2, 1/4, 1/4; at temperature 1/2 their squares 4 : 1 : 1; of the last two alone 1 : 1."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3)[None]
    tokens = torch.tensor([[0, 1, 2]])

    def scores(temperature, support=None):
        packed = None if support is None else pack_support(torch.tensor(support).expand(1, 3, 3))
        return (
            chosen_log_probs(logits, tokens, temperature=temperature, support=packed).exp(),
            entropies(logits, temperature=temperature, support=packed),
        )

    likely, spread = scores(1.0)
    torch.testing.assert_close(likely, torch.tensor([[1 / 2, 1 / 4, 1 / 4]]))
    torch.testing.assert_close(spread, torch.full((1, 3), 1.5 * math.log(2)))
    likely, spread = scores(0.5)
    torch.testing.assert_close(likely, torch.tensor([[2 / 3, 1 / 6, 1 / 6]]))
    torch.testing.assert_close(spread, torch.full((1, 3), 2 / 3 * math.log(1.5) + 1 / 3 * math.log(6)))
    likely, spread = scores(1.0, [False, True, True])
    torch.testing.assert_close(likely, torch.tensor([[0.0, 1 / 2, 1 / 2]]))
    torch.testing.assert_close(spread, torch.full((1, 3), math.log(2)))
    assert scores(1.0, [True, False, False])[1].tolist() == [[0, 0, 0]], "nothing to choose from"


def test_the_largest_uniform_never_leaves_the_support():
    logits = torch.randn(256, 1000, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 600:] = -torch.inf  # the total is reached long before the last code
    for largest, dtype in ((1 - 2**-24, torch.float32), (1 - 2**-53, torch.float64)):
        uniforms = torch.full((256, 1), largest, dtype=dtype)
        assert uniforms.max() < 1
        tokens, log_probs, _ = draw_all(logits, uniforms)
        assert tokens.max() < 600 and log_probs.isfinite().all()


def test_greedy_takes_the_most_probable_code():
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    tokens, log_probs, _ = draw_all(logits, torch.zeros(32, 1), do_sample=False)
    assert torch.equal(tokens[:, 0], logits.argmax(-1))
    torch.testing.assert_close(log_probs[:, 0], logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_draws_have_the_frequencies_of_the_distribution(top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1)) * 1.5
    uniforms = torch.rand(20000, 1, generator=torch.Generator().manual_seed(2))
    tokens, _, _ = draw_all(logits.expand(20000, 12), uniforms, temperature=0.8, top_p=top_p)
    expected = (logits[0] / 0.8).softmax(-1)
    expected = expected * nucleus(expected, top_p) if top_p < 1 else expected
    counted = tokens.flatten().bincount(minlength=12) / 20000
    torch.testing.assert_close(counted, expected / expected.sum(), atol=0.012, rtol=0)


def test_a_long_draw_is_packed_in_order():
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    sampler = TokenSampler(torch.full((3, 150), 0.5), 40, temperature=1.0, top_p=0.5, do_sample=True)
    for step in range(150):
        sampler.draw(logits.roll(step, -1))
    tokens, log_probs, support = sampler.result()
    kept = nucleus(logits.softmax(-1), 0.5)
    expected = torch.stack([kept.roll(step, -1) for step in range(150)], dim=1)
    assert torch.equal(unpack_support(support, 40), expected)
    steps = torch.stack([logits.roll(step, -1) for step in range(150)], dim=1)
    replayed = chosen_log_probs(steps, tokens, temperature=1.0, support=support)
    torch.testing.assert_close(replayed, log_probs, atol=1e-5, rtol=0)


def test_logits_that_are_not_finite_stop_the_rollout():
    with pytest.raises(FloatingPointError, match="not finite"):
        draw_all(torch.full((2, 8), torch.nan), torch.full((2, 3), 0.5), top_p=0.9)
