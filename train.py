"""Train GLM-Image: python train.py --config configs/t2i_training.yaml"""

from glm_training.cli.training import main

if __name__ == "__main__":
    main()
