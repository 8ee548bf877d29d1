"""Checkpoints in the forms that other libraries read."""
