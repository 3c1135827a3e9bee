"""Particles in, Zarr shards out. No torch here."""
