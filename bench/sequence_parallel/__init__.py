"""Sequence parallelism on one device: every rank's exact shapes, and a model of the rest."""
