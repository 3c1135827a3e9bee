"""What keeps a run alive over stops: checkpoints and the stop flag."""
