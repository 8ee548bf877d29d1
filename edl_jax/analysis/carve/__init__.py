"""Carving: the experts that a domain needs, and a model of them alone."""
