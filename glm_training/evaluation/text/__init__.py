"""Is the text that a prompt asks for in the picture: CVTG-2K and LongText-Bench, by the rules of their authors."""
