"""Faults on purpose: runs that are killed, damaged, filled up and poisoned."""
