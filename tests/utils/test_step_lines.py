"""Files of lines by step, also after a kill in the middle of a line."""

import json

from glm_training.utils.step_lines import has_step, keep_until


def test_a_torn_line_is_set_aside_and_counts_as_no_step(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    whole = [json.dumps({"step": step, "scores": {}}) + "\n" for step in (0, 4)]
    path.write_text("".join(whole) + '{"step": 8, "sco')
    assert has_step(path, 4) and not has_step(path, 8)
    keep_until(path, 8)
    assert path.read_text() == "".join(whole)
    assert (tmp_path / "evaluations.discarded.jsonl").read_text() == '{"step": 8, "sco\n'
    keep_until(path, 0)
    assert path.read_text() == whole[0]
