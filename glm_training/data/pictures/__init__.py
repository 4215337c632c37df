"""One picture: its bytes, its pixels, its size in a batch."""
