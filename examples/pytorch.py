"""The expert divergence loss in PyTorch, for any mixture-of-experts model.

  python examples/pytorch.py

trains a router on four made-up domains and prints the loss as it falls. In your
own training copy this file, which needs PyTorch alone, and add to your loss,
for each mixture-of-experts layer,

  p_DE, count_D = domain_routing(probs_BTE, weights_BT, domain_B, num_domains)
  loss = loss + 0.01 / num_layers * expert_divergence_loss(p_DE, count_D)

where `probs_BTE` is the router's softmax over all experts, before top-k.

Under torch.distributed the sums are those of all ranks, so that the loss is
that of the global batch. Every rank has the same loss, and gradients are right
where they are averaged over ranks, as DistributedDataParallel and FSDP do.

Axis letters: B sequences, T positions, D domains, E experts, M width, I pairs
of domains.
Source: Li et al., ICLR 2026, arXiv:2603.00054.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def _half_log_ratio(p: Tensor, q: Tensor) -> Tensor:
  """Returns log(2 p / (p + q)) / 2, which does not cancel near p = q."""
  total = torch.where(p + q > 0, p + q, 1)
  u = (p - q) / total
  near = u.abs() < 0.5
  far = torch.log((2 * p / total).clamp_min(torch.finfo(p.dtype).tiny))
  return torch.where(near, torch.log1p(torch.where(near, u, 0)), far) / 2


class _JensenShannonTerms(torch.autograd.Function):
  """The summands of JSD(p, q), elementwise: (p + q) g(u) / 4.

  With u = |p - q| / (p + q), g(u) = (1+u) log(1+u) + (1-u) log(1-u) is a power
  series where u is small. The textbook form of JSD cancels there, which is
  where the loss -log(JSD) is steepest.
  """

  @staticmethod
  def forward(context, p, q):
    context.save_for_backward(p, q)
    total = torch.where(p + q > 0, p + q, 1)
    u = (p - q).abs() / total
    near = torch.zeros_like(u)
    for k in range(12, 0, -1):
      near = (near + 1 / (k * (2 * k - 1))) * (u * u)
    rest = 2 * torch.minimum(p, q) / total
    far = (1 + u) * torch.log1p(u) + torch.xlogy(rest, rest)
    return total * torch.where(u < 0.25, near, far) / 4

  @staticmethod
  @once_differentiable
  def backward(context, gradient):
    p, q = context.saved_tensors
    return gradient * _half_log_ratio(p, q), gradient * _half_log_ratio(q, p)


class _SumOverRanks(torch.autograd.Function):
  """Adds a tensor up over ranks; its gradient too."""

  @staticmethod
  def forward(context, x):
    del context
    x = x.clone()
    dist.all_reduce(x)
    return x

  @staticmethod
  @once_differentiable
  def backward(context, gradient):
    del context
    gradient = gradient.clone()
    dist.all_reduce(gradient)
    return gradient


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
  """Jensen-Shannon divergence along the last axis, in nats, in [0, ln 2]."""
  return _JensenShannonTerms.apply(*torch.broadcast_tensors(p, q)).sum(-1)


def domain_routing(
  probs_BTE: Tensor, weights_BT: Tensor, domain_B: Tensor, num_domains: int
) -> tuple[Tensor, Tensor]:
  """Averages router probabilities per sequence, then per domain, of all ranks.

  Args:
    probs_BTE: router softmax over all experts, before top-k.
    weights_BT: 1 where a token counts, 0 for padding.
    domain_B: integer domain label of each sequence, in [0, num_domains).

  Returns:
    p_DE, float32, zeros for a domain that does not occur; and count_D, the
    sequences of each domain with at least one counted token.
  """
  # Autocast would multiply in bfloat16.
  with torch.autocast(probs_BTE.device.type, enabled=False):
    weights_BT = weights_BT.float()
    tokens_B = weights_BT.sum(-1)
    member_BD = torch.nn.functional.one_hot(domain_B.long(), num_domains)
    member_BD = member_BD * (tokens_B > 0)[:, None].float()
    sum_BE = torch.einsum("bte,bt->be", probs_BTE.float(), weights_BT)
    sequence_BE = sum_BE / tokens_B.clamp_min(1)[:, None]
    sum_DE, count_D = member_BD.T @ sequence_BE, member_BD.sum(0)
  if dist.is_available() and dist.is_initialized():
    sum_DE, count_D = map(_SumOverRanks.apply, (sum_DE, count_D))
  return sum_DE / count_D.clamp_min(1)[:, None], count_D


def expert_divergence_loss(
  p_DE: Tensor, present_D: Tensor, eps: float = 1e-8
) -> Tensor:
  """Mean of -log(JSD(p_j, p_k) + eps) over pairs of domains of the batch.

  Args:
    p_DE: mean router probabilities of each domain over the *global* batch.
    present_D: positive where the domain occurs in the batch.
    eps: added to the divergence inside the logarithm.

  Returns:
    A scalar; 0, with a gradient of zero, if fewer than two domains occur.
  """
  present_D = present_D > 0
  p_DE = torch.where(present_D[:, None], p_DE, 1 / p_DE.shape[1])
  j_I, k_I = torch.triu_indices(len(p_DE), len(p_DE), 1, device=p_DE.device)
  counts_I = present_D[j_I] & present_D[k_I]
  divergence_I = jensen_shannon(p_DE[j_I], p_DE[k_I])
  loss_I = -torch.log(torch.where(counts_I, divergence_I + eps, 1))
  return loss_I.sum() / counts_I.sum().clamp_min(1)


def main() -> None:
  """Trains a router on four domains, without any other loss."""
  torch.manual_seed(0)
  domain_B = torch.arange(32) % 4
  topic_DM = torch.randn(4, 128)
  tokens_BTM = 0.5 * topic_DM[domain_B][:, None] + torch.randn(32, 64, 128)
  weights_BT = torch.ones(32, 64)
  router = torch.nn.Linear(128, 16, bias=False)
  optimizer = torch.optim.SGD(router.parameters(), lr=0.01)
  for step in range(101):
    probs_BTE = router(tokens_BTM).softmax(-1)
    p_DE, count_D = domain_routing(probs_BTE, weights_BT, domain_B, 4)
    loss = expert_divergence_loss(p_DE, count_D)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
      print(f"step {step}: divergence loss {loss.item():.2f}")


if __name__ == "__main__":
  main()
