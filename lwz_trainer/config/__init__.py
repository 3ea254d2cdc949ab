"""Frozen dataclasses; YAML files and command-line flags are read into them."""
