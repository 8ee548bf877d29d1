"""Topic classifiers: learned, saved, damaged, and measured."""

import json
import random
import re

import numpy as np
import pytest

from data.labels import load_rules
from data.topics import TopicClassifier, main, train_and_measure, train_topics
from edl_jax.config import UserError

WORDS = {
  "sea": ["wave", "salt", "harbour", "sail", "anchor", "tide"],
  "law": ["court", "judge", "statute", "appeal", "contract", "tort"],
  "诗": ["春风", "明月", "江水", "落花", "孤舟", "青山"],
}


def sample(topic, rng):
  return " ".join(rng.choices([*WORDS[topic], "the", "of", "and"], k=30))


@pytest.fixture(scope="module")
def classifier():
  rng = random.Random(0)
  topics = list(WORDS) * 60
  return train_topics([sample(t, rng) for t in topics], topics)


def test_topics_are_learned(classifier, tmp_path):
  rng = random.Random(1)
  for topic in WORDS:
    name, share = classifier.classify(sample(topic, rng))
    assert name == topic and share > 0.6
  shares = classifier.probabilities([sample(t, rng) for t in WORDS] + [""])
  np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)

  classifier.save(str(tmp_path / "topics"))
  copy = TopicClassifier.load(str(tmp_path / "topics"))
  assert copy.labels == tuple(sorted(WORDS))
  np.testing.assert_array_equal(
    copy.probabilities(["tide"]), classifier.probabilities(["tide"])
  )
  # The model's folder is looked for beside the file of rules.
  rules = tmp_path / "rules.yaml"
  rules.write_text("rules: [{by: topic, model: topics, labels: {sea: water}}]")
  topic = load_rules(str(rules))
  assert topic({"text": sample("sea", rng)}).name == "water"
  assert topic({"text": sample("law", rng)}) is None


def test_damaged_model_is_named(classifier, tmp_path):
  folder = tmp_path / "topics"
  classifier.save(str(folder))
  (folder / "labels.json").write_text('["one"]')
  with pytest.raises(
    UserError, match=r"topics: no topic classifier \(labels and"
  ):
    TopicClassifier.load(str(folder))
  classifier.save(str(folder))
  content = (folder / "model.npz").read_bytes()
  (folder / "model.npz").write_bytes(content[: len(content) // 2])
  with pytest.raises(UserError, match=r"topics: no topic classifier"):
    TopicClassifier.load(str(folder))


def test_two_topics():
  rng = random.Random(0)
  topics = ["sea", "law"] * 30
  two = train_topics([sample(t, rng) for t in topics], topics)
  assert two.classify(sample("sea", rng))[0] == "sea"
  assert two.classify(sample("law", rng))[0] == "law"
  with pytest.raises(UserError, match="needs two labels"):
    train_topics(["a"], ["sea"])


def test_accuracy_is_of_samples_left_out(tmp_path):
  rng = random.Random(0)
  with open(tmp_path / "a.jsonl", "w") as file:
    for n in range(300):
      topic = list(WORDS)[n % 3]
      # Nobody can tell the label of the third from its text.
      text = sample(topic, rng) if topic != "诗" else str(rng.random())
      domain = topic if topic != "诗" else rng.choice(["sea", "law"])
      file.write(json.dumps({"text": text, "domain": domain}) + "\n")
  _, lines = train_and_measure(f"{tmp_path}/a.jsonl")
  right = float(re.search(r"accuracy (\S+) on", lines[0])[1])
  assert 0.7 < right < 0.97
  assert [line.split()[0] for line in lines[1:]] == ["law", "sea"]
  (tmp_path / "b.jsonl").write_text('{"text": "x"}')
  with pytest.raises(UserError, match=r"b\.jsonl:1: a sample needs a domain"):
    train_and_measure(f"{tmp_path}/b.jsonl")


def test_command(tmp_path, capsys):
  rng = random.Random(0)
  with open(tmp_path / "a.jsonl", "w") as file:
    for n in range(60):
      topic = ("sea", "law")[n % 2]
      record = {"text": sample(topic, rng), "domain": topic}
      file.write(json.dumps(record) + "\n")
  out = str(tmp_path / "topics")
  assert main([f"--files={tmp_path}/a.jsonl", f"--out={out}"]) == 0
  assert capsys.readouterr().out.endswith(f"\nwritten to {out}\n")
  assert TopicClassifier.load(out).labels == ("law", "sea")
  assert main([f"--files={tmp_path}/none", f"--out={out}"]) == 2
  assert "--files=" in capsys.readouterr().err
