"""Measurements of speed and accuracy, one command each; nothing in the program imports them."""
