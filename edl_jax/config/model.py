"""The model's part of an experiment: its sizes and how it is computed."""

import dataclasses

from edl_jax.fields import field


@dataclasses.dataclass(unsafe_hash=True)
class ModelConfig:
  """Sizes of the transformer (Qwen3-MoE shape), and how it is computed.

  Every option that changes the function that the model computes belongs here:
  training, evaluation and inspection of a checkpoint all see these fields.
  """

  vocabulary_size: int = field(
    4096, at_least=1, help="Vocabulary, V; a tokenizer may have fewer tokens."
  )
  num_layers: int = field(
    4, at_least=1, help="Layers of the transformer, dense ones included, L."
  )
  width: int = field(128, at_least=1, help="Width of the residual stream, M.")
  num_heads: int = field(
    4, at_least=1, help="Query heads, N, a multiple of num_kv_heads."
  )
  num_kv_heads: int = field(2, at_least=1, help="Key and value heads, K.")
  head_width: int = field(
    32, at_least=1, help="Width of an attention head, H. It must be even."
  )
  num_experts: int = field(
    16, at_least=1, help="Routed experts of a mixture-of-experts layer, E."
  )
  num_active_experts: int = field(
    2, at_least=1, help="Experts that the router chooses for each token, A."
  )
  router: str = field(
    "learned",
    choices=("learned", "domain"),
    help="Experts that a token's router may choose: all (learned), or the fixed"
    " ones of its row's fine domain (domain), as a reference.",
  )
  router_scores: str = field(
    "softmax",
    choices=("softmax", "sigmoid"),
    help="Scores that the router makes of its logits. Gates are scores of the"
    " active experts. Losses and statistics see each token's scores divided by"
    " their sum.",
  )
  router_softcap: float = field(
    0.0,
    at_least=0,
    help="Bounds each router logit x by this c, as c tanh(x / c). 0: no bound.",
  )
  gates: str = field(
    "renormalized",
    choices=("renormalized", "raw"),
    help="Weights of the active experts: their scores divided by the sum of"
    " these scores (renormalized), or the scores themselves (raw).",
  )
  gate_scale: float = field(
    1.0, above=0, help="Factor of the gates of the routed experts."
  )
  balancing: str = field(
    "loss",
    choices=("loss", "bias", "both"),
    help="What balances the load of experts: L_LB with losses.balance_weight"
    " (loss); a bias of each expert, added to its score for the choice alone,"
    " which each step moves by optimizer.bias_rate towards the mean load"
    " (bias), without L_LB; or both.",
  )
  pool_min: int = field(
    0,
    at_least=0,
    help="Fewest experts in the pool that a document's tokens choose from in"
    " training. 0 for both bounds: no pools.",
  )
  pool_max: int = field(
    0, at_least=0, help="Most experts in the pool of a document."
  )
  expert_width: int = field(
    128, at_least=1, help="Hidden width of an expert, F."
  )
  num_shared_experts: int = field(
    0, at_least=0, help="Further experts, which every token passes through."
  )
  num_dense_layers: int = field(
    0, at_least=0, help="First layers, which have a SwiGLU in place of experts."
  )
  dense_width: int = field(
    512, at_least=1, help="Hidden width of the SwiGLU of a dense layer."
  )
  rope_theta: float = field(
    10_000.0, above=0, help="Base of the rotary position embedding."
  )
  rope_scaling: str = field(
    "none",
    choices=("none", "linear", "yarn"),
    help="How rotary frequencies are lowered for rows longer than those of"
    " pre-training: not, all by rope_factor (linear), or the slow ones alone"
    " (yarn).",
  )
  rope_factor: float = field(
    1.0,
    at_least=1,
    help="Longest row as a multiple of rope_original_length; needs rope_scaling"
    " other than none.",
  )
  rope_original_length: int = field(
    4096,
    at_least=1,
    help="Longest row of pre-training, in tokens; yarn alone reads it.",
  )
  norm_epsilon: float = field(
    1e-6, above=0, help="Added to the mean square inside RMSNorm."
  )
  qk_norm: str = field(
    "head",
    choices=("head", "full", "none"),
    help="What RMSNorm normalises in queries and keys: each head by itself, all"
    " heads of a token together (full), or nothing.",
  )
  attention_bias: str = field(
    "none",
    choices=("none", "qkv", "all"),
    help="Projections of attention that add a bias: none, those to queries,"
    " keys and values (qkv), or these and the output (all).",
  )
  shared_expert_gate: bool = field(
    False,
    help="Whether each token multiplies the output of the shared experts by a"
    " sigmoid.",
  )
  tied_embeddings: bool = field(
    False, help="Whether the head is the transposed embedding."
  )
  dtype: str = field(
    "float32",
    choices=("float32", "bfloat16"),
    help="Type of activations and matrix products. Parameters, router and"
    " statistics are always float32.",
  )
  remat: str = field(
    "none",
    choices=("none", "full", "attention", "experts", "auto"),
    resumable=True,
    help="What the backward pass computes again. It keeps everything (none),"
    " the input of each layer (full), that and the output of attention"
    " (attention), or these and the first product of the experts (experts)."
    " Training compiles until the first of none, experts, attention and full"
    " fits, and remembers it (auto).",
  )
  logits_elements: int = field(
    1 << 22,
    at_least=1,
    resumable=True,
    help="Elements of the largest array of logits that a device holds at a"
    " time. With a large vocabulary, TPUs want 2**27 or more.",
  )
  scan_unroll: int = field(
    1,
    at_least=1,
    resumable=True,
    help="Layers in each iteration of the loop over layers. More layers take"
    " longer to compile and speed up small models on a CPU.",
  )


@dataclasses.dataclass(unsafe_hash=True)
class MoEConfig:
  """How devices bring tokens and experts together.

  These fields decide speed and memory. Options that change how tokens are
  routed change the function of the model and belong in `ModelConfig`:
  evaluation uses the defaults of this group whatever the experiment says.
  """

  dispatch: str = field(
    "gather",
    choices=("gather", "ragged_all_to_all", "ring", "capacity"),
    help="How tokens reach their experts. All experts come to the tokens"
    " (gather), or tokens travel to the devices of their experts, which"
    " mesh.expert spreads (ragged_all_to_all on TPU v5p and v6e, ring). These"
    " three compute the same function. In blocks of fixed size (capacity),"
    " training drops the tokens beyond an expert's capacity. Evaluation always"
    " gathers and drops none.",
  )
  capacity_factor: float = field(
    1.25,
    above=0,
    help="Places of an expert on each device under capacity dispatch, as a"
    " multiple of the tokens that it would get under perfect balance.",
  )
