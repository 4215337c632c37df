"""Post-training for GLM-Image: reward training and supervised finetuning from one YAML file."""

__version__ = "0.1.0"
