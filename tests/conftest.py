"""What every test needs, set before JAX starts."""

import atexit
import os
import shutil
import sys
import tempfile

# Eight CPU devices. LLVM's optimisations, and XLA's emitters for fusions, would
# cost the tests more time than they save; programs and numerics are the same
# without.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
  " --xla_cpu_use_fusion_emitters=false"
)
# The runs that tests start compile the same programs, and read the same text,
# again and again. Shared by the workers of one test run, which inherit it.
if "EDL_JAX_TEST_CACHE" not in os.environ:
  os.environ["EDL_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="edl_jax_test_")
  atexit.register(shutil.rmtree, os.environ["EDL_JAX_TEST_CACHE"], True)
_CACHE = os.environ["EDL_JAX_TEST_CACHE"]
os.environ["EDL_JAX_CACHE"] = os.path.join(_CACHE, "edl_jax")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_CACHE, "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# `experiments` and `data` are read from the checkout, as users do.
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
