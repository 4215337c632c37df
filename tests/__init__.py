"""A package, so that this folder is found before one of the same name that a library installs (torch-fidelity)."""
