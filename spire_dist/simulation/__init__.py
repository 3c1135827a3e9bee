"""Particle sets with known truth, made as the benchmark makes them."""
