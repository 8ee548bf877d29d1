"""The examples run; tests/interop compares the one in PyTorch with ours."""

from examples import plain_jax


def test_divergence_makes_domains_route_differently(capsys):
  plain_jax.main()
  without, with_loss = capsys.readouterr().out.splitlines()
  assert without.startswith("divergence weight 0.0: LM loss ")
  diversity = [float(line.split()[-3]) for line in (without, with_loss)]
  assert diversity[1] > 1.5 * diversity[0]
