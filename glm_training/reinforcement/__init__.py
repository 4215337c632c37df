"""A reward step, in order: rollout, scoring, credit, resampling, gate, updates; monitors watch it."""
