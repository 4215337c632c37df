"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): objects, their number, colours and places."""
