"""In which order samples are drawn."""
