import time
from pathlib import Path

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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # logins
        ("http://:PW@h", "http://***@h"),
        ("http://onlyuser@h/x", "http://***@h/x"),
        ("http://u:p@ss@h/x", "http://***@h/x"),
        ("http://u%40mail:p%2Fw@h:80/x@y", "http://***@h:80/x@y"),
        ("git+ssh://me@h", "git+ssh://***@h"),
        ("?next=https%3A%2F%2Fu%3Apw%40h%2Fx", "?next=https%3A%2F%2F***%40h%2Fx"),
        # queries
        ("https://h/x?key=abc&n=1", "https://h/x?key=***&n=1"),
        ("https://h/x?n=1&sig=a%2Fb%3D", "https://h/x?n=1&sig=***"),
        (
            "https://h/x?X-Amz-Signature=ab12&X-Amz-Credential=AK%2F1&w=64",
            "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***&w=64",
        ),
        ("https://h/cb#access_token=abc&x=1", "https://h/cb#access_token=***&x=1"),
        ("https://h/x?code=abc'", "https://h/x?code=***'"),
        # headers
        ("Authorization: Bearer abc", "Authorization: ***"),
        ("'authorization': 'Basic dTpw'", "'authorization': '***'"),
        ("authorization=Token abc x", "authorization=*** x"),
        ("sent Bearer abc123.x-y_z", "sent Bearer ***"),
        ("sent Basic dXNlcjpwYXNzMTI=", "sent Basic ***"),
        ("-H X-Api-Key: abc", "-H X-Api-Key: ***"),
        ("authorization by bearer abc123xyz", "authorization by bearer ***"),
        ("Bearer: abc123xyz", "Bearer ***"),
        ("Cookie: session=abc123xyz", "Cookie: ***"),
        ("'set-cookie': 'sid=1'", "'set-cookie': '***'"),
        # options of a command line
        ("serve --token abc123 --port 80", "serve --token *** --port 80"),
        ("serve --hub-password abc123", "serve --hub-password ***"),
        # pairs
        ("override `a.hf_token=abc`: x", "override `a.hf_token=***`: x"),
        ("accessToken: abc; n: 1", "accessToken: ***; n: 1"),
        ("aws_secret_access_key = abc/def+g", "aws_secret_access_key = ***"),
        ("password: hunter2", "password: ***"),
        ("API key: s3cr3tvalue", "API key: ***"),
        ("body token%3Dabc123", "body token%3D***"),
        ("AccountKey=abc; End", "AccountKey=***; End"),
        ("auth_key: 'abc'", "auth_key: '***'"),
        ("https://h/x?pw=abc", "https://h/x?pw=***"),
        # shapes
        ("hf_" + "a1B2" * 8, "***"),
        ("login with sk-proj-" + "a1_B" * 8 + ", please", "login with ***, please"),
        ("sk-" + "x" * 48, "***"),
        ("AKIAIOSFODNN7EXAMPLE.", "***."),
        ("ghp_" + "a1B2" * 9, "***"),
        ("gsk_" + "a1B2" * 13, "***"),
        ("nvapi-" + "a1B2" * 16, "***"),
        ("pypi-AgEI" + "a1B2" * 12, "***"),
        ("SG." + "a1B2" * 5 + "." + "a1B2" * 10, "***"),
        ("whsec_" + "a1B2" * 8, "***"),
        ("github_pat_" + "a1_B" * 9, "***"),
        ("wandb login " + "0a" * 20, "wandb login ***"),
        ("logging.wandb_entity=" + "0a" * 20, "logging.wandb_entity=***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.sig-1_x", "***"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nb", "a\n***\nb"),
    ],
)
def test_secrets_of_every_form(text, wanted):
    assert redact(text) == wanted
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize(
    "prompt",
    [
        'a door with the password: "OPEN SESAME"',
        "the secret: a garden behind a wall",
        "SECRET: the last page, PASSWORD: OPEN",
        "a ring bearer, a Bearer of the torch and a standard-bearer at 12:30",
        "Basic shapes: 3 circles and 12 squares",
        "a token: one coin, and ten tokens: a pile",
        "mail me@example.org, or see http://example.org/@user and https://host:8080/a?b=c",
        "what? a key=board, and the monkey = ape",
        "credentials on a table, a card key, an api",
        "sk-learn, hf_hub and a ski-lift-at-the-mountain-of-ice",
        "commit 0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a of a tree",
        "1:30, 2001-01-01, #hashtag & more; a=b",
        "a bearer of light, the bearer: an old man, a cookie: chocolate, three cookies",
        "--token of love, --password and --secret - a sign",
        "token=' ', password: \"\"",
    ],
)
def test_innocent_texts_stay(prompt):
    assert redact(prompt) == prompt


def test_the_package_s_own_prompts_and_documents_hold_no_secrets():
    root = Path(__file__).parents[2]
    files = [*root.glob("data/**/*.txt"), *root.glob("data/**/*.jsonl"), *root.glob("configs/**/*.yaml")]
    files += [path for path in root.glob("docs/*.md") if path.name != "configuration.md"]
    assert len(files) > 30
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert redact(line) == line


def test_a_long_text_takes_no_long_time():
    start = time.process_time()
    for text in ("a" * 200_000, "secret" * 30_000, "http://" + "a" * 200_000, "?" + "key" * 60_000, "eyJ" * 60_000):
        redact(text)
    assert time.process_time() - start < 20


def test_values_of_the_environment_are_masked_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sup3rsecret")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    assert redact("path/sup3rsecret/on") == "path/***/on"
    monkeypatch.setenv("PG_PASSWORD", 'p@s/s "w')
    for form in ('p@s/s "w', "p%40s/s%20%22w", "p%40s%2Fs+%22w", "p%40s%2Fs%20%22w", 'p@s/s \\"w'):
        assert redact(f"<{form}>") == "<***>"


def test_a_secret_that_begins_another_does_not_show_the_others_rest(monkeypatch):
    monkeypatch.setenv("FIRST_TOKEN", "plum-stone")
    monkeypatch.setenv("SECOND_TOKEN", "plum-stone-orchard")
    assert redact("<plum-stone-orchard> <plum-stone>") == "<***> <***>"


def test_what_a_shell_says_of_itself_is_no_secret(monkeypatch):
    """A path of the user's is in every message; `PWD` is where he is, no password."""
    for name in (
        "PWD",
        "OLDPWD",
        "HOME",
        "PATH",
        "SSH_AUTH_SOCK",
        "TOKENIZERS_PARALLELISM",
        "XDG_SESSION_ID",
        "GPG_KEY",
    ):
        monkeypatch.setenv(name, f"/home/somebody/{name.lower()}")
        assert redact(f"/home/somebody/{name.lower()}/run") == f"/home/somebody/{name.lower()}/run"


def test_nested_values():
    settings = {"a": [{"hf_token": "abc"}, "secret=abc"], "token": None, "n": 1, 3: ("x",)}
    assert redact_values(settings) == {"a": [{"hf_token": "***"}, "secret=***"], "token": None, "n": 1, 3: ["x"]}
    assert settings["token"] is None and settings["a"][0] == {"hf_token": "abc"}


@pytest.mark.parametrize("name", ["PWD", "OLDPWD"])
def test_the_shells_working_directory_is_no_password(monkeypatch, name):
    """Every path in a message would be masked."""
    monkeypatch.setenv(name, "/home/someone/rewards")
    monkeypatch.setenv("DB_PWD", "hunter22hunter")
    text = "raised KeyError (/home/someone/rewards/own.py:3), DB hunter22hunter"
    assert redact(text) == "raised KeyError (/home/someone/rewards/own.py:3), DB ***"
