"""The schema in words: for messages, docs/configuration.md and editors."""
