"""The model families this version converts and trains, one declarative file each, and how one is chosen."""

from __future__ import annotations

from modellink_lora.config.errors import UserError
from modellink_lora.models.families.llama import LLAMA
from modellink_lora.models.families.mistral import MISTRAL
from modellink_lora.models.families.qwen2 import QWEN2
from modellink_lora.models.families.qwen3 import QWEN3
from modellink_lora.models.family import Family

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3)


def family_of(hf_model_type: str) -> Family:
    """The family of a `model_type` of config.json. Raises UserError listing what there is."""
    for family in FAMILIES:
        if hf_model_type in family.hf_model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.hf_model_types)
    raise UserError(f"config.json: model_type {hf_model_type!r} is not supported; supported are {known}")


def family_named(model_type_hf: str) -> Family:
    """The family of a `--model-type-hf` value. Raises UserError listing what there is."""
    for family in FAMILIES:
        if model_type_hf == family.name or model_type_hf in family.hf_model_types:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"--model-type-hf {model_type_hf} is not supported; supported are {known}")


def check_name(model_type_hf: str, family: Family, *, where: str) -> None:
    """Raise UserError when `--model-type-hf` names another family than the model in `where` belongs to.

    `llama2` is how scripts name every Llama-shaped model, so it agrees with all families here.
    """
    if model_type_hf != LLAMA.name and family_named(model_type_hf) is not family:
        raise UserError(
            f"--model-type-hf {model_type_hf} contradicts {where}, which says model_type {family.hf_model_types[0]}: "
            "remove the flag"
        )
