"""Runs for a long time, and whether they grow."""
