"""What people look at after a run: scores, maps, files for other programs, the report."""
