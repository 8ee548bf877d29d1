"""Reads the text that the commands of `data` write, and packs it into rows."""
