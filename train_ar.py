"""Train the AR half of GLM-Image: python train_ar.py --config configs/t2i_training.yaml"""

from glm_training.cli.training import main

if __name__ == "__main__":
    main("ar")
