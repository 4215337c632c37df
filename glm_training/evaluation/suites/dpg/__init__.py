"""DPG-Bench (Hu et al. 2024, ELLA, arXiv 2403.05135): dense prompts, each with a tree of questions with yes or no."""
