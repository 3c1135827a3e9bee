"""Measurements of speed and accuracy, one command each; nothing in the program imports them."""

import os

# OpenMP threads that spin while they wait measure the neighbours' load, not the program: on a shared machine a single
# small torch operation then takes a hundred times longer. Read when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
