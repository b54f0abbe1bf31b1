"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): 57 subjects, files without header, categories of the paper."""

from __future__ import annotations

from pathlib import Path

from modellink_lora.evaluation.item import Item, Options, Task
from modellink_lora.evaluation.tasks.four_choices import Layout, exam_items, read_letter

_LAYOUT = Layout(test="_test.csv", dev="_dev.csv", below=("test", "data/test"), header=False)
_BY_CATEGORY = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
CATEGORIES = {subject: category for category, subjects in _BY_CATEGORY.items() for subject in subjects.split()}


def items(folder: Path, options: Options) -> list[Item]:
    return exam_items(
        folder, options, task="mmlu", layout=_LAYOUT, language="en", names={}, categories=CATEGORIES
    )  # fmt: skip


TASK = Task("mmlu", "mmlu", items, read_letter, languages=("en", "zh"))
