"""Scores of held-out prompts, and figures of pictures."""
