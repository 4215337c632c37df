"""The commands: `glm-train` (`main`), and what train.py, train_ar.py and train_dit.py share (`training`)."""
