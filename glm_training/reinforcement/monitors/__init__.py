"""Whether a reward is being hacked."""
