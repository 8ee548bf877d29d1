"""Routing by task, against the textbook divergence."""

import json

import numpy as np
import pytest

from edl_jax.config import UserError
from edl_jax.tasks.routing import (
  DomainRouting,
  nearest_domain,
  read_domain_routing,
  routing_by_task,
)
from edl_jax.tasks.scoring import TaskRouting
from tests.tasks.naive import jensen_shannon


def report(seed=0):
  """Returns the report of two layers, three domains and four experts."""
  p_LDE = np.random.default_rng(seed).dirichlet(np.ones(4), (2, 3))
  # The second domain has no text.
  p_LDE[:, 1] = 0
  return {"domains": ["law", "none", "code"], "probabilities": p_LDE.tolist()}


def test_routing_and_distance_by_task():
  random = np.random.default_rng(1)
  p_LDE = random.dirichlet(np.ones(4), (2, 2))
  counts_LDE = random.integers(1, 9, (2, 2, 4)).astype(float)
  sums = TaskRouting(
    p_LDE * np.array([5, 3])[:, None], np.tile([5.0, 3.0], (2, 1)), counts_LDE
  )
  domains = DomainRouting.from_report(report())
  assert domains.names == ["law", "code"]
  found = routing_by_task(["a", "b"], sums, domains, first_layer=1)
  assert found["layers"] == [1, 2]
  assert found["domains"] == ["law", "code"]
  for d, name in enumerate(["a", "b"]):
    task = found["tasks"][name]
    np.testing.assert_allclose(task["probabilities"], p_LDE[:, d])
    for layer in range(2):
      counts_E = counts_LDE[layer, d]
      np.testing.assert_allclose(
        task["assignments"][layer], counts_E / counts_E.sum()
      )
      for i, domain_LE in enumerate(domains.probability_LDE.swapaxes(0, 1)):
        assert task["divergence"][layer][i] == pytest.approx(
          jensen_shannon(p_LDE[layer, d], domain_LE[layer]), rel=1e-5
        )
    means = np.mean(task["divergence"], axis=0)
    nearest = "law" if means[0] < means[1] else "code"
    assert nearest_domain(found, name) == nearest
  unknown = routing_by_task(["a", "b"], sums, None)
  assert unknown["domains"] is None
  assert "divergence" not in unknown["tasks"]["a"]
  assert nearest_domain(unknown, "a") == ""


def test_the_report_of_the_step_is_read(tmp_path):
  folder = str(tmp_path)
  assert read_domain_routing(folder, 5) is None
  (tmp_path / "routing.json").write_text(json.dumps(report(0)))
  (tmp_path / "result.json").write_text(json.dumps({"step": 5}))
  at_end = read_domain_routing(folder, 5)
  assert at_end is not None
  want_LDE = np.array(report(0)["probabilities"])[:, [0, 2]]
  np.testing.assert_array_equal(at_end.probability_LDE, want_LDE)
  assert read_domain_routing(folder, 4) is None
  evaluation = {"step": 4, "report": report(1)}
  (tmp_path / "eval.json").write_text(json.dumps(evaluation))
  earlier = read_domain_routing(folder, 4)
  assert earlier is not None
  assert not np.array_equal(earlier.probability_LDE, at_end.probability_LDE)
  assert read_domain_routing(folder, 5) is not None
  (tmp_path / "eval.json").write_text("{")
  with pytest.raises(UserError, match=r"eval\.json: damaged"):
    read_domain_routing(folder, 5)
