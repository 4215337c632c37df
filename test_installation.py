"""Check that everything a run needs is here: python test_installation.py"""

from glm_training.cli.doctor import main

if __name__ == "__main__":
    main()
