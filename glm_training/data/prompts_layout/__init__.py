"""Prompts in a text, with or without their pictures in folders beside it."""
