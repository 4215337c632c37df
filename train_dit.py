"""Train the DiT half of GLM-Image: python train_dit.py --config configs/t2i_training.yaml"""

from glm_training.cli.training import main

if __name__ == "__main__":
    main("dit")
