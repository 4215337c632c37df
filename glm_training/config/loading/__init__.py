"""From YAML files and overrides to a `Config`, or to all that is wrong with them."""
