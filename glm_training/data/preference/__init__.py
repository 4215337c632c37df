"""Preference pairs on disk to pairs in memory."""
