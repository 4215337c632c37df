"""One file for each layout that captioned pictures come in."""
