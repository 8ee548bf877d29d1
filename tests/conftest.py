"""Settings of every test, made before JAX starts."""

import atexit
import os
import shutil
import sys
import tempfile

# Tests import `experiments` and `data` from the checkout, as users do.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tests.xla import FAST_FLAGS

# Eight CPU devices. LLVM's optimisations and XLA's fusion emitters are off: the
# tests are small, so that both take more time than they save. The programs and
# their numerics stay the same.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  f"--xla_force_host_platform_device_count=8 {FAST_FLAGS}"
)
# Tests start many runs that compile the same programs and read the same text.
# The workers of one test run inherit this variable, and so share one cache.
if "EDL_JAX_TEST_CACHE" not in os.environ:
  os.environ["EDL_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="edl_jax_test_")
  atexit.register(shutil.rmtree, os.environ["EDL_JAX_TEST_CACHE"], True)
_CACHE = os.environ["EDL_JAX_TEST_CACHE"]
os.environ["EDL_JAX_CACHE"] = os.path.join(_CACHE, "edl_jax")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_CACHE, "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
