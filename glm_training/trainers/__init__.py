"""Trainers: they compose models, data, rewards and methods; the loop is in `base_trainer`."""
