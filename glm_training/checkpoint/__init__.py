"""Checkpoints: committed whole or not at all (`commit`), verified (`manifest`), found again (`resume`)."""
