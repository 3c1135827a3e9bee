"""All that runs outside a training process: submission to a batch system."""
