"""The decode step that a CUDA graph replays, taken here without one: the same tokens as the host's steps, whatever the
prompts, the sampling and the adapters; and what happens where it cannot be recorded."""

import logging
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from glm_training.models.glm_image.ar import ARComponent
from glm_training.models.glm_image.decode_graph import WARM_UP, WORTH, GraphError, Stepper, obstacle
from glm_training.models.glm_image.tiny import build_tiny

SHORT, LONG = "a red circle", 'a sign that says "hello" next to a blue square'


def sharpened(dtype=torch.float32):
    """Random weights so large that positions and prompts matter to the logits, as they do in a trained model."""
    pipeline = build_tiny()
    with torch.no_grad():
        for weight in pipeline.vision_language_encoder.parameters():
            if weight.ndim > 1:
                weight.mul_(4)
    return ARComponent(pipeline.vision_language_encoder.to(dtype), pipeline.processor)


@pytest.fixture
def ar():
    return sharpened()


class Recorder:
    """Stands for a graph: replays a step by taking it. Counts its replays, and whether it was let go."""

    def __init__(self):
        self.replays, self.open = 0, 0

    @contextmanager
    def __call__(self, step):
        def replay():
            self.replays += 1
            step()

        self.open += 1
        try:
            yield replay
        finally:
            self.open -= 1


def edits(ar, prompts, side=96):
    """Prompts with a source image each: there is no preview, so the plans are short."""
    sources = torch.rand(len(prompts), 3, 64, 96, generator=torch.Generator().manual_seed(5))
    return ar.encode_prompts(prompts, side, side, sources)


def drawn(ar, prompt, group, stepper, seed=0, **options):
    uniforms = torch.rand(len(prompt) * group, prompt.T, generator=torch.Generator().manual_seed(seed))
    ar.stepper = stepper
    return ar.rollout(prompt, group, uniforms, **{"temperature": 0.9, "top_p": 0.75} | options)


def assert_same_with_a_graph(ar, prompt, group, atol=1e-5, **options):
    recorder = Recorder()
    plain = drawn(ar, prompt, group, Stepper(False), **options)
    graphed = drawn(ar, prompt, group, Stepper(True, recorder), **options)
    assert recorder.replays == prompt.T - 1 - WARM_UP + 1, "one replay is the check"
    assert recorder.open == 0
    assert torch.equal(plain.tokens, graphed.tokens)
    torch.testing.assert_close(plain.log_probs, graphed.log_probs, atol=atol, rtol=0)
    assert (plain.support is None) == (graphed.support is None)
    assert plain.support is None or torch.equal(plain.support, graphed.support)
    return plain


@pytest.mark.parametrize("sampling", [{}, {"top_p": 1.0}, {"do_sample": False}], ids=str)
@pytest.mark.parametrize("prompts", [[SHORT], [SHORT, LONG]], ids=["one prompt", "padded"])
def test_the_step_of_a_graph_is_the_plain_step(ar, prompts, sampling):
    prompt = edits(ar, prompts, 128)
    assert prompt.padded == (len(prompts) > 1)
    plain = assert_same_with_a_graph(ar, prompt, 3, **sampling)
    assert len(plain.tokens.unique(dim=0)) == len(prompts) * (1 if "do_sample" in sampling else 3)


def test_with_previews(ar):
    assert_same_with_a_graph(ar, ar.encode_prompts([SHORT, LONG], 64, 96), 1)


def test_with_adapters(ar):
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=list(ARComponent.lora_targets), init_lora_weights=False)
    prompt = edits(ar, [SHORT, LONG])
    before = drawn(ar, prompt, 2, Stepper(False))
    inject_adapter_in_model(config, ar.model)
    ar.train()
    after = assert_same_with_a_graph(ar, prompt, 2)
    assert not torch.equal(before.tokens, after.tokens)


def test_in_bf16():
    """Over masked places attention may sum in another order. bf16 rounds by 2^-9 of a value at each of some thirty sums
    and products of two layers, so a logit by about sqrt(30) 2^-9 of the largest one; a log-prob has two of them."""
    ar = sharpened(torch.bfloat16)
    prompt = edits(ar, [SHORT, LONG])
    plain = drawn(ar, prompt, 4, Stepper(False), top_p=1.0)
    graphed = drawn(ar, prompt, 4, Stepper(True, Recorder()), top_p=1.0)
    before = (plain.tokens == graphed.tokens).cumprod(1).bool()  # a draw on the edge parts two plans from there on
    assert before.float().mean() > 0.5
    with torch.no_grad():
        hidden, _, _ = ar._read(plain.prompt, plain.tokens, 0.9, None)
        bound = 2 * 30**0.5 * 2**-9 * float(ar.model.lm_head(hidden).abs().max()) / 0.9
    assert (plain.log_probs - graphed.log_probs)[before].abs().max() < bound < 1


def test_rollouts_in_parts_record_each_part(ar):
    prompt = edits(ar, [SHORT, LONG])
    recorder = Recorder()
    whole = drawn(ar, prompt, 2, Stepper(False))
    parts = drawn(ar, prompt, 2, Stepper(True, recorder), micro_batch_size=1)
    assert torch.equal(whole.tokens, parts.tokens) and recorder.replays == 4 * (prompt.T - WARM_UP)


def test_auto_records_what_is_worth_it(ar):
    for side, worth in ((96, False), (192, True)):
        prompt = edits(ar, [SHORT], side)
        assert (prompt.T - 1 >= WORTH) == worth
        recorder = Recorder()
        drawn(ar, prompt, 1, Stepper("auto", recorder))
        assert (recorder.replays > 0) == worth


def test_an_abandoned_rollout_lets_the_graph_go(ar):
    prompt = edits(ar, [SHORT])
    ar.stepper = Stepper(True, recorder := Recorder())
    uniforms = torch.rand(1, prompt.T)

    def stop(step):
        assert recorder.open == (step > WARM_UP)
        if step == WARM_UP + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ar.rollout(prompt, 1, uniforms, temperature=1.0, top_p=1.0, on_step=stop)
    assert recorder.open == 0 and recorder.replays == 2


@contextmanager
def failing(step):
    raise RuntimeError("operation not permitted when stream is capturing\nmore words")
    yield


@contextmanager
def lossy(step):
    """A recording without the kernels of a library: what is replayed draws nothing."""
    yield lambda: None


@contextmanager
def stale(step):
    """A recording that draws with something left over from another step."""
    sampler = step.__self__.sampler

    def replay():
        step()
        sampler._log_probs[:, WARM_UP] += 0.5

    yield replay


@pytest.mark.parametrize(
    "recorder, reason",
    [
        (failing, "not permitted when stream is capturing"),
        (lossy, "part of it was not recorded"),
        (stale, "part of it was not recorded"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_taken_plainly_and_told_once(ar, caplog, recorder, reason):
    prompt = edits(ar, [SHORT, LONG], 192)
    expected = drawn(ar, prompt, 1, Stepper(False))
    stepper = Stepper("auto", recorder)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = drawn(ar, prompt, 1, stepper)
            assert torch.equal(found.tokens, expected.tokens)
            torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and reason in told[0] and "more words" not in told[0]
    with pytest.raises(GraphError, match=reason):
        drawn(ar, prompt, 1, Stepper(True, recorder))


def test_on_the_cpu_there_is_no_graph(ar):
    assert "not on a GPU" in obstacle(ar.model)
    prompt = edits(ar, [SHORT])
    drawn(ar, prompt, 1, Stepper("auto"))
    with pytest.raises(GraphError, match="not on a GPU"):
        drawn(ar, prompt, 1, Stepper(True))


def test_a_step_of_the_device_never_waits_for_the_host(ar):
    """Whatever would wait reads a value: on the meta device there is none to read."""
    from glm_training.models.glm_image.ar_types import ARPrompt
    from glm_training.models.glm_image.decode import Decoding
    from glm_training.models.glm_image.token_sampling import TokenSampler

    with torch.device("meta"):
        model = build_tiny().vision_language_encoder
        whole = {"dtype": torch.long}
        prompt = ARPrompt(
            torch.zeros(2, 7, **whole),
            torch.ones(2, 7, **whole),
            torch.zeros(3, 2, 7, **whole),
            torch.zeros(3, 2, 9, **whole),
            ((3, 3),),
            0,
        )
        sampler = TokenSampler(torch.zeros(4, 9), 64, temperature=0.9, top_p=0.5, do_sample=True)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(ARPrompt, "padded", property(lambda self: True))
            Decoding(model, prompt, 2, sampler).advance_by_device()
            with pytest.raises(RuntimeError, match="meta"):
                sampler.result()
