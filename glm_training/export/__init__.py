"""What leaves a run: pipelines, adapters and weights for other programs, each with a card, verified, pushed if asked."""
