"""A stream of tokens equals the documents written end to end."""

import numpy as np
import pytest

from edl_jax.text.token_stream import EncodedDocuments, TokenStream

START = 7


@pytest.fixture(params=["array", "files"])
def documents(request):
  """Returns documents, some empty, and the tokens of each as a list."""
  rng = np.random.default_rng(0)
  texts = [
    rng.integers(0, 60_000, size).tolist() for size in (3, 0, 5, 1, 0, 0, 4)
  ]
  lengths = list(map(len, texts))
  if request.param == "array":
    tokens = np.array([t for text in texts for t in text], np.uint16)
    return EncodedDocuments.from_array(tokens, lengths), texts
  # Two files, which hold the documents in another order.
  files = [[6, 2, 1], [5, 0, 3, 4]]
  arrays = [
    np.array([t for i in own for t in texts[i]], np.uint32) for own in files
  ]
  file_of = [
    next(f for f, own in enumerate(files) if i in own) for i in range(7)
  ]
  start_of = [
    sum(lengths[i] for i in files[f][: files[f].index(number)])
    for number, f in enumerate(file_of)
  ]
  columns = (np.array(x, np.int64) for x in (file_of, start_of, lengths))
  return EncodedDocuments(arrays, *columns), texts


def test_every_slice_of_the_stream(documents):
  encoded, texts = documents
  whole = [token for text in texts for token in (START, *text)] + [START]
  stream = TokenStream(encoded, START)
  assert len(stream) == len(whole) == encoded.token_count + 1
  for start in range(len(whole) + 2):
    for stop in range(start, len(whole) + 3):
      tokens = stream[start:stop]
      assert tokens.tolist() == whole[start:stop]
      assert tokens.dtype == np.int32
  assert stream[:].tolist() == whole


def test_documents_are_selected_by_slice_mask_and_numbers(documents):
  encoded, texts = documents
  mask = np.array([len(text) > 2 for text in texts])
  for part, chosen in (
    (slice(1, 4), texts[1:4]),
    (mask, [text for text in texts if len(text) > 2]),
    (np.array([6, 0, 6]), [texts[6], texts[0], texts[6]]),
    (slice(0, 0), []),
  ):
    selected = encoded[part]
    assert len(selected) == len(chosen)
    assert selected.token_count == sum(len(text) + 1 for text in chosen)
    expected = [token for text in chosen for token in (START, *text)] + [START]
    assert TokenStream(selected, START)[:].tolist() == expected
