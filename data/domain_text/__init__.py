"""A TFDS data set of labelled text, and the command that builds it."""
