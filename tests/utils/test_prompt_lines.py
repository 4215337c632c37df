"""Prompts beside the pictures of a step are read back as they were, one for each picture."""

from __future__ import annotations

from glm_training.utils.prompt_lines import PROMPTS, read_prompts, write_prompts

ODD = ["a cat", "two\nlines", "a\u2028b", "a\x85b", 'it says "STOP"', '"STOP" is written', "a\rb", "", "\\n", '"']


def test_every_prompt_is_read_back(tmp_path):
    for prompts in (ODD, ODD[:1], ODD[::-1], []):
        write_prompts(tmp_path, prompts)
        assert read_prompts(tmp_path) == prompts
        assert (tmp_path / PROMPTS).read_bytes().count(b"\n") == len(prompts), "a line each"


def test_lists_of_older_runs(tmp_path):
    (tmp_path / PROMPTS).write_text('"STOP" is written\n"a quoted one"\na dog\n"\n')
    assert read_prompts(tmp_path) == ['"STOP" is written', "a quoted one", "a dog", '"']
