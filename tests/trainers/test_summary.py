"""The file of held-out scores, also after a kill in the middle of a line."""

import json

from glm_training.trainers.summary import has_scores, trim_scores


def test_a_torn_line_is_set_aside_and_counts_as_no_score(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    whole = [json.dumps({"step": step, "scores": {}}) + "\n" for step in (0, 4)]
    path.write_text("".join(whole) + '{"step": 8, "sco')
    assert has_scores(path, 4) and not has_scores(path, 8)
    trim_scores(path, 8)
    assert path.read_text() == "".join(whole)
    assert (tmp_path / "evaluations.discarded.jsonl").read_text() == '{"step": 8, "sco\n'
    trim_scores(path, 0)
    assert path.read_text() == whole[0]
