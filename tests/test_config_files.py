"""Experiment files and overrides, and the errors that users make in them."""

import pathlib
import sys

import pytest

from edl_jax import config_files
from edl_jax.config import UserError

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "experiments" / "tiny.py")


def error(function, *arguments):
  with pytest.raises(UserError) as caught:
    function(*arguments)
  message = str(caught.value)
  assert "\n" not in message
  return message


def test_overrides_take_the_type_of_their_field():
  experiment = config_files.load(
    TINY, {"losses.divergence_weight": "1e-2", "data.weights": "0.5,2"}
  )
  assert experiment.losses.divergence_weight == 0.01
  assert experiment.data.weights == (0.5, 2.0)
  assert config_files.load(TINY).losses.divergence_weight == 0.01
  assert config_files.load(TINY).data.weights == ()


@pytest.mark.parametrize(
  ("wrong", "nearest"),
  [
    ("model.num_expert", "model.num_experts"),
    ("modle.num_experts", "model.num_experts"),
    ("losses.divergence_wieght", "losses.divergence_weight"),
    ("num_experts", "model.num_experts"),
    ("train.learning_rate", "optimizer.learning_rate"),
    ("sed", "seed"),
  ],
)
def test_unknown_key_names_the_nearest(wrong, nearest):
  for message in (
    error(config_files.load, TINY, {wrong: 1}),
    error(config_files.split_overrides, [f"--experiment.{wrong}=1"]),
    error(config_files.split_overrides, [f"--experiment.{wrong}", "1"]),
  ):
    assert message == (
      f"unknown key experiment.{wrong}; did you mean {nearest}?"
    )


def test_key_that_resembles_none_lists_all():
  message = error(config_files.load, TINY, {"qqqqqqqq": 1})
  assert "experiment.qqqqqqqq" in message and "mesh.tensor" in message


def test_group_cannot_be_set():
  assert error(config_files.load, TINY, {"model": 1}) == (
    "experiment.model is a group: set one of its fields, which --describe=model"
    " lists"
  )


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("model.num_layers", "two"),
    ("model.num_layers", "1.5"),
    ("losses.divergence_weight", "much"),
    ("data.weights", "a,b"),
    ("data.domains", "'a',1"),
  ],
)
def test_wrong_type_names_key_and_value(key, value):
  message = error(config_files.load, TINY, {key: value})
  assert key in message
  assert value.split(",")[0] in message


def test_experiment_files(tmp_path):
  missing = str(tmp_path / "none.py")
  (tmp_path / "other.py").write_text(
    "from edl_jax.config import Experiment\n"
    "def get_config(variant=''):\n"
    "  return Experiment(name=f'other {variant}')\n"
  )
  (tmp_path / "dict.py").write_text("def get_config(): return {'seed': 1}\n")
  message = error(config_files.load, missing)
  assert missing in message and "other.py" in message
  assert "--experiment" in error(config_files.load, "")
  assert "dict" in error(config_files.load, str(tmp_path / "dict.py"))
  other = str(tmp_path / "other.py")
  assert config_files.load(other).name == "other "
  assert config_files.load(f"{other}:big").name == "other big"


@pytest.mark.parametrize(
  ("field", "named"),
  [
    ("model=config.ModelConfig(num_layers='2')", "model.num_layers"),
    ("model=config.ModelConfig(num_layers=2.5)", "model.num_layers"),
    ("data=config.DataConfig(weights=0.5)", "data.weights"),
    ("model=config.ModelConfig(num_layer=2)", "num_layer"),
  ],
)
def test_wrong_field_in_a_file_is_named(tmp_path, field, named):
  path = tmp_path / "wrong.py"
  path.write_text(
    "from edl_jax import config\n"
    "def get_config(variant=''):\n"
    f"  return config.Experiment({field})\n"
  )
  message = error(config_files.load, str(path))
  assert named in message
  assert "Traceback" not in message


def test_split_overrides():
  arguments = ["--workdir=x", "--experiment=y", "-experiment.seed=3", "--z"]
  assert config_files.split_overrides(
    [*arguments, "--experiment.data.files=a=b", "--experiment.name="]
  ) == (
    ["--workdir=x", "--experiment=y", "--z"],
    {"seed": "3", "data.files": "a=b", "name": ""},
  )
  assert error(config_files.split_overrides, ["--experiment.seed", "3"]) == (
    "--experiment.seed needs a value: write --experiment.seed=VALUE"
  )


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("def get_config(:\n", "{path}:1: SyntaxError: invalid syntax"),
    ("\nimport nowhere\n", "{path}:2: ModuleNotFoundError: No module named"),
    (
      "from edl_jax.config import ModelConfig\n"
      "def get_config():\n"
      "  return ModelConfig(learning_rat=1)\n",
      "{path}:3: TypeError: ModelConfig.__init__() got an unexpected keyword"
      " argument 'learning_rat'; did you mean optimizer.learning_rate?",
    ),
    (
      "from edl_jax.config import UserError\n"
      "def get_config(): raise UserError('take another')\n",
      "--experiment={path}: take another",
    ),
  ],
)
def test_error_in_a_file_is_one_line_with_its_place(tmp_path, source, message):
  path = tmp_path / "wrong.py"
  path.write_text(source)
  assert error(config_files.load, str(path)).startswith(
    message.format(path=path)
  )


def test_file_without_get_config(tmp_path, monkeypatch):
  # config_flags executes all files in one module, which keeps the get_config of
  # an earlier test; as in a new process, there is none.
  for name, module in list(sys.modules.items()):
    if hasattr(module, "get_config"):
      monkeypatch.delitem(sys.modules, name)
  path = tmp_path / "empty.py"
  path.write_text("x = 1\n")
  message = error(config_files.load, str(path))
  assert message == f"{path} defines no get_config()"


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("news,code", ("news", "code")),
    ("news, code", ("news", "code")),
    ("(news,g/code)", ("news", "g/code")),
    ("news", ("news",)),
    ("old news", ("old news",)),
    ("('a, b','c')", ("a, b", "c")),
    ("汉,字", ("汉", "字")),
    ("()", ()),
    ("1,2", ("1", "2")),
  ],
)
def test_names_are_separated_by_commas(text, names):
  experiment = config_files.load(TINY, {"data.domains": text})
  assert experiment.data.domains == names
