"""Whether a replay gives what was drawn, before anything is learned from it."""
