"""Random small models that Transformers saves; runs in its environment.

  python families_program.py OUT
  python families_program.py OUT FOLDER...

The second writes `tokens.json` into folders with a tokenizer, and no models.

OUT gets a folder for each model: the checkpoint, with a tokenizer; `bfloat16`,
the same in bfloat16; `gradient`, in which every tensor is the gradient of the
loss by it; `results.npz` with `tokens_BT`, `logits_BTV` and `loss`, the mean
cross-entropy of the next token; and `tokens.json` with the ids of texts and of
a conversation.

Transformers has no class of DeepSeek-MoE (version 1); `DeepSeek` below is its
formula in float64, by the names of its checkpoints.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

SIZES = {
  "vocab_size": 320,
  "hidden_size": 24,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "num_experts_per_tok": 2,
  "max_position_embeddings": 64,
}
DENSE = {"moe_intermediate_size": 12, "intermediate_size": 20}
FAMILIES = {
  "qwen3_moe": (
    transformers.Qwen3MoeConfig,
    {"num_experts": 5, "head_dim": 8, "mlp_only_layers": [0], **DENSE}
    | {"norm_topk_prob": True},
  ),
  "qwen3_moe_tied": (
    transformers.Qwen3MoeConfig,
    {"num_experts": 5, "head_dim": 8, "attention_bias": True, **DENSE}
    | {"tie_word_embeddings": True},
  ),
  "qwen3_moe_yarn": (
    transformers.Qwen3MoeConfig,
    {"num_experts": 5, "head_dim": 16, **DENSE, "norm_topk_prob": True}
    | {
      # Transformers 5 takes the keys of version 4 too.
      "rope_theta": 10000.0,
      "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
      },
    },
  ),
  "qwen3_moe_linear": (
    transformers.Qwen3MoeConfig,
    {"num_experts": 5, "head_dim": 8, **DENSE, "norm_topk_prob": True}
    | {
      "rope_theta": 10000.0,
      "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
  ),
  "mixtral": (
    transformers.MixtralConfig,
    {"num_local_experts": 5, "intermediate_size": 12},
  ),
  "olmoe": (
    transformers.OlmoeConfig,
    {"num_experts": 5, "intermediate_size": 12, "eos_token_id": 2}
    # PyTorch gives the row of this token no gradient.
    | {"pad_token_id": None},
  ),
  "qwen2_moe": (
    transformers.Qwen2MoeConfig,
    {"num_experts": 5, "shared_expert_intermediate_size": 24, **DENSE}
    | {"mlp_only_layers": [0]},
  ),
}
DEEPSEEK = {
  **SIZES,
  **DENSE,
  "architectures": ["DeepseekForCausalLM"],
  "bos_token_id": 1,
  "eos_token_id": 2,
  "first_k_dense_replace": 1,
  "hidden_act": "silu",
  "model_type": "deepseek",
  "moe_layer_freq": 1,
  "n_routed_experts": 5,
  "n_shared_experts": 2,
  "norm_topk_prob": False,
  "rms_norm_eps": 1e-6,
  "rope_scaling": None,
  "rope_theta": 10000,
  "scoring_func": "softmax",
  "torch_dtype": "float32",
}
TEXTS = ["", "a b", " two  spaces", "Ünï 漢字 😀\n", "<s>a</s>", "x<0x0A>"]
CONVERSATION = [
  {"role": "user", "content": "a b"},
  {"role": "assistant", "content": "ba"},
]
TEMPLATE = (
  "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
  "{{ eos_token }}{% endfor %}"
)


def randomise(parameters, generator):
  """Draws every parameter by name; norms around 1, biases too."""
  for name, parameter in parameters:
    drawn = torch.randn(parameter.shape, generator=generator) * 0.2
    parameter.data.copy_(drawn + ("norm" in name))


def byte_level():
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {"<s>": 0, "</s>": 1, "<|user|>": 2, "<|assistant|>": 3}
  vocabulary |= {c: 4 + i for i, c in enumerate(letters)}
  vocabulary["ab"] = len(vocabulary)
  library = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
  library.normalizer = normalizers.NFC()
  library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  library.decoder = decoders.ByteLevel()
  return library


def sentencepiece():
  """The form in which Transformers keeps Llama's SentencePiece models."""
  vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|user|>": 3}
  vocabulary |= {"<|assistant|>": 4}
  vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
  for piece in ("▁", "a", "b", "▁a", "▁ab"):
    vocabulary[piece] = len(vocabulary)
  merges = [("▁", "a"), ("▁a", "b")]
  library = tokenizers.Tokenizer(
    models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
  )
  library.normalizer = normalizers.Sequence(
    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
  )
  library.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  library.post_processor = processors.TemplateProcessing(
    single="<s> $A",
    special_tokens=[("<s>", vocabulary["<s>"])],
  )
  return library


def save_tokenizer(library, folder):
  library.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=library, bos_token="<s>", eos_token="</s>"
  )
  tokenizer.chat_template = TEMPLATE
  tokenizer.save_pretrained(folder)
  write_tokens(folder)


def write_tokens(folder):
  """Writes what AutoTokenizer makes of the texts and of the conversation."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  chat = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
  ids = [tokenizer(text).input_ids for text in [*TEXTS, chat]]
  content = {
    "ids": ids,
    "texts": [tokenizer.decode(each) for each in ids],
    "special": [tokenizer.bos_token, tokenizer.eos_token],
    "chat": chat,
  }
  with open(f"{folder}/tokens.json", "w", encoding="utf-8") as file:
    json.dump(content, file)


def loss_of(logits_BTV, tokens_BT):
  return torch.nn.functional.cross_entropy(
    logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()
  )


def save_family(name, config_class, settings, tokens_BT, out):
  config = config_class(**(SIZES | settings))
  model = transformers.AutoModelForCausalLM.from_config(config)
  randomise(model.named_parameters(), torch.Generator().manual_seed(0))
  folder = f"{out}/{name}"
  model.save_pretrained(folder, max_shard_size="60KB")
  logits_BTV = model(tokens_BT).logits
  loss = loss_of(logits_BTV, tokens_BT)
  loss.backward()
  np.savez(
    f"{folder}/results.npz",
    tokens_BT=tokens_BT.numpy(),
    logits_BTV=logits_BTV.detach().numpy(),
    loss=loss.item(),
  )
  # Saved like parameters, so that Transformers gives them the file's names.
  gradients = [parameter.grad.clone() for parameter in model.parameters()]
  model.to(torch.bfloat16).save_pretrained(f"{folder}/bfloat16")
  model.to(torch.float32)
  for parameter, gradient in zip(model.parameters(), gradients):
    parameter.data.copy_(gradient)
  model.save_pretrained(f"{folder}/gradient")


class DeepSeek:
  """DeepSeek-MoE (Dai et al., arXiv:2401.06066) in float64."""

  def __init__(self, hub, tensors):
    self.hub, self.tensors = hub, tensors

  def linear(self, x, name):
    return x @ self.tensors[f"{name}.weight"].T

  def norm(self, x, name):
    mean = (x**2).mean(-1, keepdim=True)
    scale = self.tensors[f"{name}.weight"]
    return x / torch.sqrt(mean + self.hub["rms_norm_eps"]) * scale

  def rotate(self, x_TNH):
    half = x_TNH.shape[-1] // 2
    exponent = torch.arange(half, dtype=torch.float64) / half
    angle = torch.arange(len(x_TNH))[:, None] * 10000.0**-exponent
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x_TNH[..., :half], x_TNH[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  def attention(self, x, name):
    width = self.hub["hidden_size"] // self.hub["num_attention_heads"]
    q, k, v = (
      self.linear(x, f"{name}.{part}_proj").reshape(len(x), -1, width)
      for part in "qkv"
    )
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (self.rotate(k), v))
    logits = torch.einsum("tnh,snh->nts", self.rotate(q), k) / width**0.5
    later = torch.ones(len(x), len(x)).triu(1).bool()
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    y = torch.einsum("nts,snh->tnh", weights, v).reshape(len(x), -1)
    return self.linear(y, f"{name}.o_proj")

  def swiglu(self, x, name):
    gate = torch.nn.functional.silu(self.linear(x, f"{name}.gate_proj"))
    up = self.linear(x, f"{name}.up_proj")
    return self.linear(gate * up, f"{name}.down_proj")

  def experts(self, x, name):
    scores = self.linear(x, f"{name}.gate").softmax(-1)
    weights, chosen = scores.topk(self.hub["num_experts_per_tok"])
    rows = []
    for t in range(len(x)):
      parts = [
        weight * self.swiglu(x[t], f"{name}.experts.{int(expert)}")
        for weight, expert in zip(weights[t], chosen[t])
      ]
      rows.append(sum(parts))
    return torch.stack(rows) + self.swiglu(x, f"{name}.shared_experts")

  def logits(self, tokens_T):
    x = self.tensors["model.embed_tokens.weight"][tokens_T]
    for layer in range(self.hub["num_hidden_layers"]):
      name = f"model.layers.{layer}"
      h = self.norm(x, f"{name}.input_layernorm")
      x = x + self.attention(h, f"{name}.self_attn")
      h = self.norm(x, f"{name}.post_attention_layernorm")
      is_dense = layer < self.hub["first_k_dense_replace"]
      branch = self.swiglu if is_dense else self.experts
      x = x + branch(h, f"{name}.mlp")
    return self.linear(self.norm(x, "model.norm"), "lm_head")


def deepseek_shapes():
  """Returns the shape of every tensor, by name."""
  hub = DEEPSEEK
  m, v = hub["hidden_size"], hub["vocab_size"]
  kv = m // hub["num_attention_heads"] * hub["num_key_value_heads"]
  shapes = {
    "model.embed_tokens": (v, m),
    "model.norm": (m,),
    "lm_head": (v, m),
  }

  def swiglu(name, width):
    shapes[f"{name}.gate_proj"] = shapes[f"{name}.up_proj"] = (width, m)
    shapes[f"{name}.down_proj"] = (m, width)

  for layer in range(hub["num_hidden_layers"]):
    name = f"model.layers.{layer}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
      shapes[f"{name}.{norm}"] = (m,)
    for part, outputs in {"q": m, "k": kv, "v": kv, "o": m}.items():
      shapes[f"{name}.self_attn.{part}_proj"] = (outputs, m)
    if layer < hub["first_k_dense_replace"]:
      swiglu(f"{name}.mlp", hub["intermediate_size"])
      continue
    shapes[f"{name}.mlp.gate"] = (hub["n_routed_experts"], m)
    for expert in range(hub["n_routed_experts"]):
      swiglu(f"{name}.mlp.experts.{expert}", hub["moe_intermediate_size"])
    width = hub["n_shared_experts"] * hub["moe_intermediate_size"]
    swiglu(f"{name}.mlp.shared_experts", width)
  return {f"{name}.weight": shape for name, shape in shapes.items()}


def save_deepseek(tokens_BT, out):
  folder = f"{out}/deepseek"
  tensors = {
    name: torch.empty(shape) for name, shape in deepseek_shapes().items()
  }
  randomise(tensors.items(), torch.Generator().manual_seed(0))
  exact = {k: v.double().requires_grad_() for k, v in tensors.items()}
  model = DeepSeek(DEEPSEEK, exact)
  logits_BTV = torch.stack([model.logits(row) for row in tokens_BT])
  loss = loss_of(logits_BTV, tokens_BT)
  loss.backward()
  for name, content in {
    "": tensors,
    "/bfloat16": {k: v.bfloat16() for k, v in tensors.items()},
    "/gradient": {k: v.grad.float() for k, v in exact.items()},
  }.items():
    os.makedirs(f"{folder}{name}")
    save_file(content, f"{folder}{name}/model.safetensors")
    with open(f"{folder}{name}/config.json", "w", encoding="utf-8") as file:
      json.dump(DEEPSEEK, file)
  np.savez(
    f"{folder}/results.npz",
    tokens_BT=tokens_BT.numpy(),
    logits_BTV=logits_BTV.detach().numpy(),
    loss=loss.item(),
  )


def main(out, *folders):
  if folders:
    for folder in folders:
      write_tokens(folder)
    return
  random = np.random.default_rng(0)
  tokens_BT = torch.tensor(random.integers(0, 320, (3, 24)))
  for name, (config_class, settings) in FAMILIES.items():
    save_family(name, config_class, settings, tokens_BT, out)
    save_tokenizer(byte_level(), f"{out}/{name}")
  save_deepseek(tokens_BT, out)
  for name in ("mixtral", "deepseek"):
    save_tokenizer(sentencepiece(), f"{out}/{name}")


if __name__ == "__main__":
  main(*sys.argv[1:])
