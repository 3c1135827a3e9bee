"""Particles out of the store, in a reproducible order."""
