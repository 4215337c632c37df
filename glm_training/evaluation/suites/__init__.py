"""Benchmarks in three stages with files between them: `protocol` says what a suite is, `stages` runs it."""
