"""CryoSPIRE on one machine or many: particles in, parts, latents and maps out."""

import os

__version__ = "0.1.0"

# Threads of torch that wait sleep instead of spinning: they share the cores with the loader and the projector's threads,
# and on a busy node a spinning thread can hold up a small product a hundredfold. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
