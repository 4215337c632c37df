"""What knows nothing of training: files, processes, signals, randomness, the terminal."""
