"""What leaves a run: pipelines, adapters and weights for other programs, verified, with a card, pushed if asked."""
