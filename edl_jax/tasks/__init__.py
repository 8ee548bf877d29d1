"""Judging a model by the answers that it finds likely."""
