"""From text to rows of packed tokens."""
