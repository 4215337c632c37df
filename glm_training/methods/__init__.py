"""A method's loss over what was drawn or encoded: no optimizer, no loop, no rewards."""
