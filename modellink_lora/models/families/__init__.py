"""The model families this version converts and trains, one declarative file each, and how one is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from modellink_lora.config.document import typed
from modellink_lora.config.errors import UserError
from modellink_lora.config.model import ModelConfig
from modellink_lora.models.families.baichuan import BAICHUAN
from modellink_lora.models.families.bloom import BLOOM
from modellink_lora.models.families.gemma import GEMMA, GEMMA2
from modellink_lora.models.families.glm import CHATGLM, GLM, GLM4
from modellink_lora.models.families.index import INDEX
from modellink_lora.models.families.internlm import INTERNLM, INTERNLM2
from modellink_lora.models.families.llama import LLAMA
from modellink_lora.models.families.minicpm import MINICPM
from modellink_lora.models.families.mistral import MISTRAL
from modellink_lora.models.families.mixtral import MIXTRAL
from modellink_lora.models.families.qwen import QWEN
from modellink_lora.models.families.qwen2 import QWEN2
from modellink_lora.models.families.qwen3 import QWEN3
from modellink_lora.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from modellink_lora.models.family import Family
from modellink_lora.models.shapes import tensor_names

FAMILIES = (
    LLAMA, MISTRAL, QWEN, QWEN2, QWEN3, BAICHUAN, CHATGLM, GLM, GLM4, INTERNLM, INTERNLM2, GEMMA, GEMMA2, BLOOM,
    MINICPM, INDEX, MIXTRAL, QWEN2_MOE, QWEN3_MOE,
)  # fmt: skip
_LATENT = "has latent attention (MLA), yarn positions and dense first layers, which no model here has"
_NOT_OFFERED = {  # names that launch scripts and config.json use -> why there is no family of them
    **dict.fromkeys(("deepseek2", "deepseek2-lite", "deepseek_v2"), _LATENT),
    "minicpm-moe": "has MiniCPM's scaled branches around experts, which no model here has",
}

# What tells the family of a checkpoint that does not name it: a ModelConfig field, its telling value, a model_type.
_SIGNS: tuple[tuple[str, Any, str], ...] = (
    ("embed_layernorm", True, "bloom"),
    ("attn_logit_softcapping", None, "gemma2"),
    ("post_norm", True, "gemma2"),
    ("add_rmsnorm_offset", True, "gemma"),
    ("qk_layernorm", True, "qwen3"),
    ("rotary_interleaved", True, "chatglm"),
    ("scale_depth", None, "minicpm"),
    ("position_embedding_type", "alibi", "baichuan"),
    ("normalize_head", True, "baichuan"),
    ("add_dense_bias", True, "llama"),
    ("add_qkv_bias", True, "qwen2"),
)


# Some published config.json have no model_type, only the class in them.
_CLASSES = {"MiniCPMForCausalLM": "minicpm"}


class _Named(TypedDict, total=False):
    model_type: str
    architectures: list[str]


def with_model_type(config: dict[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """A config.json with its model_type, which follows from its class where it is left out.

    Raises:
        UserError: one of the two is of another type, or there is neither.
    """
    typed({key: config[key] for key in ("model_type", "architectures") if config.get(key)}, _Named, where=where)
    named = (_CLASSES[name] for name in config.get("architectures") or () if name in _CLASSES)
    model_type = config.get("model_type") or next(named, None)
    return {**config, "model_type": model_type} if model_type else config


def family_of(hf_model_type: str) -> Family:
    """The family of a `model_type` of config.json. Raises UserError listing what there is."""
    for family in FAMILIES:
        if hf_model_type in family.hf_model_types:
            return family
    _refuse(hf_model_type, "config.json: model_type")
    known = ", ".join(name for family in FAMILIES for name in family.hf_model_types)
    raise UserError(f"config.json: model_type {hf_model_type!r} is not supported; supported are {known}")


def family_named(model_type_hf: str) -> Family:
    """The family of a `--model-type-hf` value. Raises UserError listing what there is."""
    for family in FAMILIES:
        if model_type_hf in family.spellings:
            return family
    _refuse(model_type_hf, "--model-type-hf")
    known = ", ".join(dict.fromkeys(name for family in FAMILIES for name in family.spellings))
    raise UserError(f"--model-type-hf {model_type_hf} is not supported; supported are {known}")


def _refuse(name: str, where: str) -> None:
    if name in _NOT_OFFERED:
        raise UserError(f"{where} {name} is not supported: it {_NOT_OFFERED[name]}")


def guess_model_type(fields: Mapping[str, Any]) -> str:
    """A `model_type` whose family has the tensors of a model of which these ModelConfig fields are known."""
    if fields.get("post_norm") and fields.get("add_qkv_bias"):
        return GLM4.hf_model_types[0]
    if fields.get("num_experts"):
        shared, normed = fields.get("moe_shared_expert_intermediate_size"), fields.get("qk_layernorm")
        return (QWEN2_MOE if shared else QWEN3_MOE if normed else MIXTRAL).hf_model_types[0]
    for name, telling, model_type in _SIGNS:
        value = fields.get(name)
        if value and (telling is None or value == telling):
            return model_type
    return LLAMA.hf_model_types[0]


def has_its_tensors(config: ModelConfig) -> bool:
    """Whether the model's family has exactly the tensors that its settings ask for."""
    return not _differences(config)


def check_tensors(config: ModelConfig) -> None:
    """Raise UserError when the settings ask for tensors that the model's family does not have, or leave some out."""
    for name, verb in _differences(config).items():
        raise UserError(
            f"no model family here has this combination of settings: as {config.hf_model_type} it would {verb} {name}"
        )


def _differences(config: ModelConfig) -> dict[str, str]:
    held = {spec.name for spec in family_of(config.hf_model_type).tensors(config)}
    asked = set(tensor_names(config))
    return {name: "have" if name in held else "lack" for name in sorted(held ^ asked)}


def check_name(model_type_hf: str, family: Family, *, where: str) -> None:
    """Raise UserError when `--model-type-hf` names another family than the model in `where` belongs to.

    One name may stand for several families: `llama2` is how scripts name most that are Llama-shaped.
    """
    family_named(model_type_hf)
    if model_type_hf not in family.spellings:
        raise UserError(
            f"--model-type-hf {model_type_hf} contradicts {where}, which says model_type {family.hf_model_types[0]}: "
            "remove the flag"
        )
