"""Commands that write text corpora; `edl_jax.text` reads them for training.

`corpora` builds a mixture from package registries, `export` writes the embedded
mixture to a file, `labels` and `topics` find domain labels, `prepare` tokenizes
a corpus once, and `domain_text` writes a TFDS data set. Arrows go one way: this
package imports `edl_jax`, which never imports it.
"""
