"""Commands that write text to train and to evaluate on.

`edl_jax.text` reads what these write, and never imports this package.

`corpora` builds a mixture from package registries, and `benchmarks` writes
zero-shot tasks; `export` writes the embedded mixture to a file; `labels` and
`topics` find domain labels; `prepare` tokenizes a corpus once; `domain_text`
writes a TFDS data set.
"""
