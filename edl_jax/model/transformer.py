"""The transformer: embedding, blocks, scan over layers, head."""

import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from edl_jax import sharding
from edl_jax.config import ModelConfig, MoEConfig
from edl_jax.losses import routing
from edl_jax.losses.cross_entropy import chunked_cross_entropy
from edl_jax.losses.divergence import token_pair_sums
from edl_jax.losses.token_pairs import TokenPairs, local_probabilities
from edl_jax.model import documents
from edl_jax.model.attention import Attention
from edl_jax.model.choice import CHOICE_SPECS, EVERY_EXPERT, Choice, make_choice
from edl_jax.model.layers import RMSNorm, SwiGLU, fan_in_normal
from edl_jax.model.moe import GATHER, MoE
from edl_jax.text.batch import Batch

# The arrays that each layer keeps for the backward pass beside its input, by
# their `checkpoint_name`; the backward pass computes the others again.
_REMAT_POLICIES = {
  "full": None,
  "attention": jax.checkpoint_policies.save_only_these_names("attention"),
  "experts": jax.checkpoint_policies.save_only_these_names(
    "attention", "experts"
  ),
}


class Block(nnx.Module):
  """Pre-norm attention, then experts or, in dense blocks, one SwiGLU."""

  def __init__(self, config: ModelConfig, key: jax.Array, *, dense: bool):
    attention, feed_forward = jax.random.split(key)
    self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
    self.attention = Attention(config, attention)
    self.feed_forward_norm = RMSNorm(config.width, config.norm_epsilon)
    if dense:
      self.mlp = SwiGLU(config, config.dense_width, feed_forward)
    else:
      self.moe = MoE(config, feed_forward)

  def __call__(
    self,
    x_BTM: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    weights_BT: jax.Array,
    summaries: routing.Summaries,
    moe: MoEConfig,
    choice: Choice = EVERY_EXPERT,
  ) -> tuple[jax.Array, Any]:
    """Returns the residual stream, and both results of `summaries`.

    In place of the latter a dense block returns None.
    """
    with jax.named_scope("attention"):
      x_BTM += self.attention(
        self.attention_norm(x_BTM), segments_BT, positions_BT
      )
    return self.feed_forward(
      x_BTM, segments_BT, weights_BT, summaries, moe, choice
    )

  def feed_forward(
    self,
    x_BTM: jax.Array,
    segments_BT: jax.Array,
    weights_BT: jax.Array,
    summaries: routing.Summaries,
    moe: MoEConfig,
    choice: Choice,
  ) -> tuple[jax.Array, Any]:
    """Runs what follows attention; returns what the block does."""
    h_BTM = self.feed_forward_norm(x_BTM)
    if hasattr(self, "mlp"):
      with jax.named_scope("experts"):
        return x_BTM + self.mlp(h_BTM), None
    y_BTM, *results = self.moe(
      h_BTM, weights_BT, summaries, moe, segments_BT, choice
    )
    return x_BTM + y_BTM, tuple(results)


class Model(nnx.Module):
  """A decoder-only mixture-of-experts language model.

  Its default shape is that of Qwen3-MoE; `ModelConfig` has what other families
  do in another way.

  Parameters are float32; layers of a kind are stacked on a leading L axis and
  scanned. Initialisation: weights truncated normal with variance 1 / fan-in
  (LeCun, 1998), branches into the residual stream scaled by 1 / sqrt(2 L)
  (GPT-2, section 2.3), embeddings of standard deviation 0.02 (GPT-2), norms 1.
  """

  def __init__(self, config: ModelConfig, key: jax.Array):
    embedding, dense, blocks, head = jax.random.split(key, 4)
    shape = (config.vocabulary_size, config.width)
    self.config = config
    self.embedding_VM = nnx.Param(
      0.02 * jax.random.normal(embedding, shape, jnp.float32)
    )
    if config.num_dense_layers:
      self.dense_blocks = jax.vmap(lambda k: Block(config, k, dense=True))(
        jax.random.split(dense, config.num_dense_layers)
      )
    num_moe_layers = config.num_layers - config.num_dense_layers
    self.blocks = jax.vmap(lambda k: Block(config, k, dense=False))(
      jax.random.split(blocks, num_moe_layers)
    )
    self.final_norm = RMSNorm(config.width, config.norm_epsilon)
    if config.tied_embeddings:
      self.head_MV = None
    else:
      self.head_MV = nnx.Param(fan_in_normal(head, shape[::-1], config.width))

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns the logits, float32 (..., V), of activations (..., M)."""
    if self.head_MV is None:
      head_MV = self.embedding_VM[...].T
    else:
      head_MV = self.head_MV[...]
    return jnp.dot(
      x, head_MV.astype(x.dtype), preferred_element_type=jnp.float32
    )

  def hidden(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    weights_BT: jax.Array,
    summaries: routing.Summaries = routing.ROUTING_ONLY,
    moe: MoEConfig = GATHER,
    choice: Choice = EVERY_EXPERT,
  ) -> tuple[jax.Array, Any, routing.OutputStats | None]:
    """Runs all but the head, on a device's rows inside `per_shard`.

    Args:
      tokens_BT, segments_BT, positions_BT, weights_BT: as in `Batch`.
      summaries: what every mixture-of-experts layer sums up.
      moe: how tokens and experts meet.
      choice: the experts that routers may choose, from `make_choice`.

    Returns:
      x_BTM after the final norm, in the compute dtype; and of every
      mixture-of-experts layer, stacked on a leading L axis, the results of
      `summaries`: those of routing, by default `RowRouting`, (L, B, ...), and
      those of outputs, by default None.

    Raises:
      ValueError: `choice` lacks what `model.router=domain` fixes.
    """
    if self.config.router == "domain" and choice.kept_LBE is None:
      raise ValueError("model.router='domain' needs a choice of make_choice")
    dtype = jnp.dtype(self.config.dtype)
    x_BTM = embed(self.embedding_VM[...], tokens_BT, dtype)

    def layer(x_BTM, inputs):
      block, choice = inputs
      return block(
        x_BTM,
        segments_BT,
        positions_BT,
        weights_BT,
        summaries,
        moe,
        choice,
      )

    # Only training resolves "auto"; elsewhere nothing is computed again.
    if self.config.remat in _REMAT_POLICIES:
      layer = jax.checkpoint(
        layer,
        policy=_REMAT_POLICIES[self.config.remat],
        # XLA cannot merge the recomputation with the forward pass across the
        # loop's boundary, so only an unrolled loop needs the barrier.
        prevent_cse=self.config.scan_unroll > 1,
      )
    scan = functools.partial(jax.lax.scan, unroll=self.config.scan_unroll)
    if self.config.num_dense_layers:
      x_BTM, _ = scan(layer, x_BTM, (self.dense_blocks, EVERY_EXPERT))
    x_BTM, (rows, outputs) = scan(layer, x_BTM, (self.blocks, choice))
    return self.final_norm(x_BTM), rows, outputs

  def __call__(
    self,
    tokens_BT: jax.Array,
    domain_B: jax.Array | None = None,
    num_domains: int = 0,
  ) -> jax.Array:
    """Returns the logits of whole documents, float32 (B, T, V).

    Inside of `jax.jit`, a model on a mesh of several devices needs
    `jax.set_mesh`.

    Args:
      tokens_BT: one document a row.
      domain_B, num_domains: fine domain label of each row, and D; only
        `model.router=domain` needs them.

    Raises:
      ValueError: labels are needed and missing.
    """
    x_BTM, _ = documents.run(
      self, tokens_BT, lambda *_: (), domain_B, num_domains
    )
    return self.logits(x_BTM)

  def token_routing(
    self,
    tokens_BT: jax.Array,
    domain_B: jax.Array | None = None,
    num_domains: int = 0,
  ) -> tuple[jax.Array, jax.Array]:
    """Routes whole documents, for analysis token by token.

    Takes and raises what `__call__` does.

    Returns:
      probs_LBTE, the float32 router probabilities of every mixture-of-experts
      layer, and expert_LBTA, int32, the active experts in the order of
      `MoE.route`.
    """

    def keep_tokens(logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT):
      del logits_BTE, gate_BTA, weights_BT
      return probs_BTE, expert_BTA

    return documents.run(self, tokens_BT, keep_tokens, domain_B, num_domains)[1]

  def _shard_sums(
    self,
    batch: Batch,
    summaries: routing.Summaries,
    moe: MoEConfig,
    pairs: TokenPairs | None,
    choice: Choice,
  ) -> tuple[Any, ...]:
    """Runs a device's share of `batch_sums`.

    Returns:
      (nats_1, squares_1), nats_BT, the routing of rows (L, B, ...), and the
      sums of outputs, the probabilities of pairs and the assignments of tokens,
      each (L, 1, ...) or None. The axes of size 1 become Z.
    """

    def rows_and_tokens(
      logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT
    ):
      rows = summaries.routing(
        logits_BTE, probs_BTE, expert_BTA, gate_BTA, weights_BT
      )
      probs_1I2E = count_1VE = None
      if pairs is not None:
        probs_1I2E = local_probabilities(probs_BTE, pairs)[None]
      if summaries.token_class_V is not None:
        count_1VE = routing.token_assignments(
          summaries.token_class_V,
          batch.tokens_BT,
          expert_BTA,
          weights_BT,
          self.config.num_experts,
        )[None]
      return rows, probs_1I2E, count_1VE

    x_BTM, (routing_LB, probs_L1I2E, count_L1VE), outputs_L = self.hidden(
      batch.tokens_BT,
      batch.segments_BT,
      batch.positions_BT,
      batch.weights_BT,
      summaries._replace(routing=rows_and_tokens),
      moe,
      choice,
    )
    head = self.embedding_VM if self.head_MV is None else self.head_MV
    with jax.named_scope("head"):
      nats, squares, nats_BT = chunked_cross_entropy(
        x_BTM,
        head[...],
        batch.targets_BT,
        batch.target_weights_BT,
        self.config.logits_elements,
        self.head_MV is None,
        summaries.output_z_weight,
      )
    outputs_L1 = jax.tree.map(lambda x: x[:, None], outputs_L)
    sums_1 = nats[None], squares[None]
    return sums_1, nats_BT, routing_LB, outputs_L1, probs_L1I2E, count_L1VE

  def batch_sums(
    self,
    batch: Batch,
    num_domains: int,
    summaries: routing.Summaries = routing.ROUTING_ONLY,
    moe: MoEConfig = GATHER,
    pairs: TokenPairs | None = None,
    kept_LE: jax.Array | None = None,
    pool_size_LBI: jax.Array | None = None,
    apart: bool = False,
  ) -> tuple[routing.BatchSums, jax.Array]:
    """Runs a batch down to the sums that objective and reports need.

    Args:
      batch: rows of the global batch.
      num_domains: D.
      summaries: what every mixture-of-experts layer sums up; `routing` must
        return a `RowRouting`.
      moe: how tokens and experts meet.
      pairs: sampled pairs of tokens, whose divergence is summed too.
      kept_LE, pool_size_LBI: what restricts the choice, see `choice.Choice`.
      apart: whether this model's parameters come from `sharding.apart`.

    Returns:
      The sums over the global batch, differentiable, and weighted nats_BT.
    """
    by_token = (sharding.ROW_AXES, "sequence")
    batch_specs = jax.tree.map(
      lambda x: PartitionSpec(*by_token[: x.ndim]), batch
    )
    # Each device that has tokens of its own contributes one sum.
    by_shard = (*sharding.ROW_AXES, "sequence")

    def of_shard(model: Model, batch: Batch, *rest: Any):
      model = sharding.first_copy(model) if apart else model
      return model._shard_sums(batch, summaries, moe, *rest)

    sums_Z, nats_BT, routing_LB, *by_shard_L = sharding.per_shard(
      of_shard,
      (
        sharding.parameter_specs(self, apart),
        batch_specs,
        *(PartitionSpec(), CHOICE_SPECS),
      ),
      (
        PartitionSpec(by_shard),
        PartitionSpec(*by_token),
        # Stacked over layers.
        PartitionSpec(None, sharding.ROW_AXES),
        *3 * [PartitionSpec(None, by_shard)],
      ),
    )(
      self,
      batch,
      pairs,
      make_choice(
        self.config, batch.domain_B, num_domains, kept_LE, pool_size_LBI
      ),
    )
    # Rows of different devices are added here and nowhere else, so every sum is
    # that of the global batch.
    outputs_L, probs_LI2E, count_LVE = jax.tree.map(
      lambda x: x.sum(1), by_shard_L
    )
    pairs_L22 = None
    if pairs is not None:
      pairs_L22 = token_pair_sums(probs_LI2E, pairs.domain_I2, pairs.counted_I)
    sums = routing.BatchSums(
      *jax.tree.map(jnp.sum, sums_Z),
      tokens=batch.target_weights_BT.sum(),
      routing=routing.collect(
        routing_LB,
        batch.domain_B,
        num_domains,
        outputs_L,
        pairs_L22,
        count_LVE,
      ),
    )
    return sums, nats_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(embedding_VM, tokens_BT, dtype) -> jax.Array:
  """Looks tokens up; the gradients of a token's places add up in float32."""
  return _embedding(embedding_VM, dtype)[tokens_BT]


def _embedding(embedding_VM, dtype):
  return sharding.gather("embedding_VM", embedding_VM.astype(dtype))


def _embed_forward(embedding_VM, tokens_BT, dtype):
  whole_VM = _embedding(embedding_VM, dtype)
  return whole_VM[tokens_BT], (tokens_BT, jnp.zeros((len(whole_VM), 0)))


def _embed_backward(dtype, residuals, dx_BTM):
  tokens_BT, sized_V = residuals
  dembedding_VM = jnp.zeros((len(sized_V), dx_BTM.shape[-1]))
  dembedding_VM = dembedding_VM.at[tokens_BT].add(dx_BTM.astype(jnp.float32))
  dembedding_VM = sharding.scatter("embedding_VM", dembedding_VM.astype(dtype))
  return dembedding_VM.astype(jnp.float32), None


embed.defvjp(_embed_forward, _embed_backward)


# Matrices that tokens are multiplied with, by the part that counts them.
_PART_OF_MATRIX = {
  **dict.fromkeys(("query_MNH", "key_MKH", "value_MKH"), "attention"),
  "out_NHM": "attention",
  "router_ME": "router",
  **dict.fromkeys(("gate_up_EM2F", "down_EFM"), "experts"),
  **dict.fromkeys(("gate_up_M2F", "down_FM"), "experts"),
  "head_MV": "head",
}


def abstract_model(config: ModelConfig) -> Model:
  """Returns the model with shapes in place of arrays; allocates nothing."""
  return jax.eval_shape(lambda: Model(config, jax.random.key(0)))


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
  """Returns (total, active) parameters.

  Active parameters are those that a token is multiplied with: all except idle
  experts and the embedding, of which a token looks up one row. Router biases
  are no parameters.
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config))
  total = sum(leaf.size for path, leaf in leaves if not sharding.is_state(path))
  expert = 3 * config.width * config.expert_width
  idle = config.num_experts - config.num_active_experts
  moe_layers = config.num_layers - config.num_dense_layers
  embedding = config.vocabulary_size * config.width
  if config.tied_embeddings:
    # The head is used as a whole.
    embedding = 0
  return total, total - moe_layers * idle * expert - embedding


def training_flops(
  config: ModelConfig,
  rows: int,
  length: int,
  learned: Collection[str] | None = None,
) -> dict[str, float]:
  """Returns the floating-point operations that a training step needs, by part.

  A multiply-add of a matrix product counts as two: once forward, once for the
  gradient of the activations, and once for that of the matrix unless it is
  frozen. Attention counts the causal pairs of a row, as if each row were one
  document. Rematerialisation and padding do not count.

  Args:
    config: sizes of the model.
    rows, length: B and T of the global batch.
    learned: names of the parameters that have a gradient; by default all.
  """
  heads = config.num_heads * config.head_width
  operations: dict[str, float] = {
    "attention": 6 * config.num_layers * heads * (length + 1),
    "router": 0,
    "experts": 0,
    "head": 0,
  }
  leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_model(config))
  for path, leaf in leaves:
    name, last = sharding.path_name(path), sharding.last_name(path)
    part = _PART_OF_MATRIX.get(last)
    if last == "embedding_VM" and config.tied_embeddings:
      part = "head"
    if part is None:
      continue
    size = leaf.size
    if last in ("gate_up_EM2F", "down_EFM"):
      size = size // config.num_experts * config.num_active_experts
    passes = 3 if learned is None or name in learned else 2
    operations[part] += 2 * passes * size
  return {part: n * rows * length for part, n in operations.items()}
