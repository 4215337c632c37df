"""The keys, a section of the YAML file each, with their defaults and descriptions."""
