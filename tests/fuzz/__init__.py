"""Readers fed with content that atheris makes."""
