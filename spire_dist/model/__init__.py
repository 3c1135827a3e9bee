"""Gaussians, their deformation by a latent, parts, and the image they make."""
