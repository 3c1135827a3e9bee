"""The run: consensus, the two stages, metrics."""
