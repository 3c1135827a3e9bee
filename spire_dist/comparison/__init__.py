"""Several methods on the same images with known truth: trained, scored alike, and put into one table."""
