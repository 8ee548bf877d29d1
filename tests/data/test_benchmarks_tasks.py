import collections
import re

from data.benchmarks_extract import EXTRACTORS
from data.benchmarks_tasks import BENCHMARKS
from edl_jax.text.task_files import FORMS


def documents(group, form):
  return sum(
    each.documents
    for each in BENCHMARKS
    if (each.group, each.form) == (group, form)
  )


def test_names_are_unique_and_safe():
  names = collections.Counter(each.name for each in BENCHMARKS)
  assert max(names.values()) == 1
  assert all(re.fullmatch(r"[a-z0-9_]+\.(rc|mc|bpb)", name) for name in names)


def test_forms_and_extractors_exist():
  assert {each.form for each in BENCHMARKS} == set(FORMS)
  assert {each.extractor for each in BENCHMARKS} == set(EXTRACTORS)


def test_a_group_is_no_task():
  tasks = {each.task for each in BENCHMARKS}
  assert not tasks & {each.group for each in BENCHMARKS}


def test_both_forms_of_a_task_have_the_same_documents():
  counts = collections.defaultdict(set)
  for each in BENCHMARKS:
    counts[each.task].add((each.documents, each.shots, each.group))
  assert all(len(found) == 1 for found in counts.values())


def test_counts_are_the_published_ones():
  # Sizes of the splits as the data sets' authors give them.
  published = {
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 3270,
    "cb": 56,
    "codex_humaneval": 164,
    "copa": 100,
    "gsm8k": 1319,
    "hellaswag": 10042,
    "lambada": 5153,
    "medmcqa": 4183,
    "medqa_en": 1273,
    "minerva_math_500": 500,
    "mrpc": 408,
    "piqa": 1838,
    "rte": 277,
    "sst2": 872,
    "winogrande": 1267,
  }
  counts = {each.task: each.documents for each in BENCHMARKS}
  assert {task: counts[task] for task in published} == published
  for form in ("rc", "mc"):
    assert documents("mmlu", form) == 14042
  assert documents("minerva_math", "bpb") == 5000
  assert documents("mt_mbpp", "bpb") == 17 * 500


def test_shots_are_in_the_folder_names_or_known_to_differ():
  for each in BENCHMARKS:
    named = re.search(r"_(\d)shot/requests", each.paths[0])
    if named and each.task != "gsm8k" and "minerva" not in each.task:
      assert each.shots == int(named[1]), each.name
