"""Poses, CTF, projection: what the microscope does. Imports nothing of the project but `errors` and `schema`."""
