import pytest

from glm_training.utils.redaction import is_secret_key, redact, redact_values


@pytest.mark.parametrize("key", ["HF_TOKEN", "token", "hub.token", "wandb_api_key", "API-KEY", "pg_password", "secret"])
def test_secret_names(key):
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["tokens", "tokenizer", "prior_tokens", "token_count", "max_tokens", "key", "seed"])
def test_everyday_names(key):
    assert not is_secret_key(key)
    assert redact(f"{key}: 12") == f"{key}: 12"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hf_token: abc123\nseed: 1", "hf_token: ***\nseed: 1"),
        ('{"api_key": "a b c", "seed": 1}', '{"api_key": "***", "seed": 1}'),
        ("password = 'x, y'", "password = '***'"),
        ("run --hub.token=abc --seed=1", "run --hub.token=*** --seed=1"),
        ("hf_token: null", "hf_token: null"),
        ("see https://me:pw@host/x", "see https://***@host/x"),
        ("https://host:80/a?b=c", "https://host:80/a?b=c"),
        ("prior tokens: 64 at 12:30", "prior tokens: 64 at 12:30"),
    ],
)
def test_texts(text, wanted):
    assert redact(text) == wanted


def test_values_of_the_environment_are_masked_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sup3rsecret")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    assert redact("path/sup3rsecret/on") == "path/***/on"


def test_nested_values():
    settings = {"a": [{"hf_token": "abc"}, "secret=abc"], "token": None, "n": 1, 3: ("x",)}
    assert redact_values(settings) == {"a": [{"hf_token": "***"}, "secret=***"], "token": None, "n": 1, 3: ["x"]}
    assert settings["token"] is None and settings["a"][0] == {"hf_token": "abc"}
