"""What Transformers makes of an exported folder; runs in its environment.

  python transformers_program.py FOLDER TOKENS.npy TEXTS.json NEW_TOKENS OUT.npz

OUT gets `logits_BTV` of the tokens, `greedy`, the ids that `generate` makes of
the first row, `ids` and `start_ids`, the texts' ids end to end without and with
special tokens, `decoded`, whether decoding restores each text, and the tensors
of the checkpoint by the package `safetensors`, as float32, under "tensor/NAME".
"""

import json
import os
import sys

# Before the library is imported: it may not ask the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder, tokens_file, texts_file, new_tokens, out):
  tokens_BT = torch.tensor(np.load(tokens_file), dtype=torch.long)
  with open(texts_file, encoding="utf-8") as file:
    texts = json.load(file)
  # "auto" is the default of Transformers 5, and float32 that of version 4.
  model, loading = AutoModelForCausalLM.from_pretrained(
    folder, dtype="auto", output_loading_info=True
  )
  for problem, keys in loading.items():
    assert not keys, (problem, keys)
  tokenizer = AutoTokenizer.from_pretrained(folder)
  with torch.no_grad():
    logits_BTV = model(tokens_BT).logits
    greedy = model.generate(
      tokens_BT[:1], max_new_tokens=int(new_tokens), do_sample=False
    )
  ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
  start_ids = [tokenizer(text).input_ids for text in texts]
  tensors = {}
  with open(f"{folder}/model.safetensors.index.json", encoding="utf-8") as file:
    weight_map = json.load(file)["weight_map"]
  for name in sorted(set(weight_map.values())):
    loaded = load_file(f"{folder}/{name}")
    assert set(loaded) == {k for k, v in weight_map.items() if v == name}
    tensors |= {f"tensor/{k}": v.float().numpy() for k, v in loaded.items()}
  np.savez(
    out,
    dtype=str(model.dtype),
    logits_BTV=logits_BTV.float().numpy(),
    greedy=greedy[0].numpy(),
    ids=np.concatenate([np.array(x, np.int64) for x in ids]),
    start_ids=np.concatenate([np.array(x, np.int64) for x in start_ids]),
    decoded=[tokenizer.decode(x) == text for x, text in zip(ids, texts)],
    **tensors,
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
