"""What a machine lacks for training, and the command that mends each thing; `glm-train doctor`."""
