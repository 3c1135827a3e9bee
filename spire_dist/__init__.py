"""CryoSPIRE on one machine or many: particles in, parts, latents and maps out."""

__version__ = "0.1.0"
