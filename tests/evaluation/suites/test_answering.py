"""What answers questions: models of transformers of the real classes, services, and chat models behind an endpoint."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from glm_training.evaluation.suites.answering import ChatAnswerer, HttpAnswerer, TransformersAnswerer, answerer
from glm_training.evaluation.suites.protocol import EvaluationError, Failure
from tests.evaluation.suites.http_answers import Answers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "is", "the", "dog", "cat", "red", "yes", "no"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)) for seed in range(3)
]
ASKED = [(PICTURES[0], ["is the dog red", "is the cat red"]), (PICTURES[1], ["is the dog red"])]


def tokenizer(folder: Path) -> BertTokenizer:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    made = BertTokenizer(str(folder / "vocab.txt"))
    made.add_special_tokens({"extra_special_tokens": ["[DEC]", "[ENC]"]})
    return made


@pytest.fixture(scope="module")
def vilt(tmp_path_factory):
    """A random classifier of three answers, loud enough to answer differently."""
    folder = tmp_path_factory.mktemp("vilt")
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=16, max_image_length=-1, id2label={0: "yes", 1: "no", 2: "green"},
        label2id={"yes": 0, "no": 1, "green": 2}, initializer_range=1.0,
    )  # fmt: skip
    model = ViltForQuestionAnswering(config)
    model.save_pretrained(folder)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}), tokenizer(folder)).save_pretrained(folder)
    return folder


def test_a_classifier_answers_with_its_likeliest_label(vilt):
    tested = TransformersAnswerer(str(vilt))
    tested.check()
    asked = [(picture, ["is the dog red", "is the cat red"]) for picture in PICTURES]
    said = tested.answer(asked)
    model, processor = ViltForQuestionAnswering.from_pretrained(vilt).eval(), ViltProcessor.from_pretrained(vilt)
    for (picture, questions), answers in zip(asked, said, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            with torch.no_grad():
                logits = model(**processor(picture, question, return_tensors="pt")).logits[0]
            assert answer == ["yes", "no", "green"][int(logits.argmax())]
    assert tested.name == f"transformers:{vilt}"


def test_a_classifier_that_is_sure_is_heard(tmp_path, vilt):
    model = ViltForQuestionAnswering.from_pretrained(vilt)
    with torch.no_grad():
        model.classifier[-1].weight.zero_()
        model.classifier[-1].bias.copy_(torch.tensor([0.0, 5.0, 1.0]))
    model.save_pretrained(tmp_path)
    ViltProcessor.from_pretrained(vilt).save_pretrained(tmp_path)
    assert TransformersAnswerer(str(tmp_path)).answer(ASKED) == [["no", "no"], ["no"]]


def test_a_writer_answers_with_what_it_writes(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": WORDS.index("[DEC]"), "eos_token_id": WORDS.index("[SEP]"), "pad_token_id": 0,
            "sep_token_id": WORDS.index("[SEP]")}  # fmt: skip
    config = BlipConfig(
        text_config={**tower, **ends, "vocab_size": len(WORDS), "encoder_hidden_size": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    model = BlipForQuestionAnswering(config)
    with torch.no_grad():  # writes "yes" until it may not any more, whatever it sees
        head = model.text_decoder.cls.predictions
        head.decoder.weight.zero_()
        head.bias[WORDS.index("yes")] = head.decoder.bias[WORDS.index("yes")] = 9.0
    model.save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer(tmp_path)).save_pretrained(tmp_path)
    tested = TransformersAnswerer(str(tmp_path))
    tested.check()
    ((first, second), (third,)) = tested.answer(ASKED)
    assert first == second == third and set(first.split()) == {"yes"}


def test_what_answers_no_questions_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(EvaluationError, match="--judge transformers:nobody/nothing is neither.*hf download nobody"):
        TransformersAnswerer("nobody/nothing").check()
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')
    with pytest.raises(EvaluationError, match=r"is a BertForMaskedLM.*openai:MODEL@ADDRESS"):
        TransformersAnswerer(str(tmp_path)).check()


def test_a_service_gets_a_picture_with_all_its_questions():
    def answers(asked: dict) -> str:
        return json.dumps({"answers": [f"{question}!" for question in asked["questions"]]})

    with Answers(answers) as service:
        tested = HttpAnswerer(service.url, retries=0)
        tested.check()
        assert tested.answer(ASKED) == [["is the dog red!", "is the cat red!"], ["is the dog red!"]]
    sent = {len(asked["questions"]): asked["image"] for asked in service.asked}
    for count, picture in ((2, PICTURES[0]), (1, PICTURES[1])):
        image = Image.open(io.BytesIO(base64.b64decode(sent[count])))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


def test_a_service_with_too_few_answers_is_asked_again_and_one_that_cannot_say_has_failed():
    few, whole = (200, '{"answers": ["yes"]}'), (200, '{"answers": ["yes", "no"]}')
    with Answers(few, (500, "busy"), whole) as service:
        assert HttpAnswerer(service.url, backoff_seconds=0).answer(ASKED[:1]) == [["yes", "no"]]
    with Answers(few) as service, pytest.raises(EvaluationError, match="1 answers for 2 questions"):
        HttpAnswerer(service.url, retries=1, backoff_seconds=0).answer(ASKED[:1])
    with Answers((200, '{"error": "blurred"}')) as service:
        assert HttpAnswerer(service.url).answer(ASKED[:1]) == [[Failure(f"{service.url}: blurred")] * 2]


def completion(text: str | None) -> str:
    return json.dumps({"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def test_a_chat_model_is_asked_greedily_with_the_picture_and_one_question():
    def answer(asked: dict) -> str:
        return completion("Yes." if "dog" in asked["messages"][0]["content"][1]["text"] else " NO\n")

    with Answers(answer) as service:
        tested = ChatAnswerer(f"openai:judge-7b@{service.url}/v1", retries=0)
        tested.check()
        assert tested.answer(ASKED) == [["yes", "no"], ["yes"]]
    assert all("POST /v1/chat/completions" in head for head in service.heads) and len(service.asked) == 3
    asked = next(a for a in service.asked if "cat" in a["messages"][0]["content"][1]["text"])
    assert (asked["model"], asked["temperature"]) == ("judge-7b", 0)
    picture, words = asked["messages"][0]["content"]
    assert words["text"] == "is the cat red Answer with yes or no and nothing else."
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(PICTURES[0]))
    assert tested.name == f"judge-7b at {service.url}/v1"


def test_what_is_neither_yes_nor_no_is_a_failure_and_not_a_no():
    with Answers((200, completion("I cannot tell."))) as service:
        ((said,),) = ChatAnswerer(f"openai:judge@{service.url}", retries=0).answer(ASKED[1:])
    assert said == Failure(f"judge at {service.url} answers 'I cannot tell.', not yes or no")
    with Answers((200, completion(None))) as service:
        ((said,),) = ChatAnswerer(f"openai:judge@{service.url}", retries=0).answer(ASKED[1:])
    assert isinstance(said, Failure)


def test_an_endpoint_that_answers_nonsense_is_told():
    with Answers((200, '{"choices": []}')) as service, pytest.raises(EvaluationError, match="not as agreed.*choices"):
        ChatAnswerer(f"openai:judge@{service.url}", retries=0).answer(ASKED[1:])


def test_names_of_judges():
    assert answerer("shapes", None).name == "shapes"
    assert answerer("transformers:a/b", None).name == "transformers:a/b"
    assert answerer("openai:org/model@1@http://host/v1", None).name == "org/model@1 at http://host/v1"
    assert answerer("https://host/below", None).name == "https://host/below"
    for wrong in ("gpt", "openai:model", "openai:@http://host", "transformers:", "http:/host"):
        with pytest.raises(EvaluationError, match="--judge"):
            answerer(wrong, None)
