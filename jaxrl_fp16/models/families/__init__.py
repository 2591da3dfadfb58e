"""Every model family by its name. A new one is a file and a row here."""

from jaxrl_fp16.models.families import llama, mistral, qwen2, qwen3
from jaxrl_fp16.models.families.family import AttentionShape, Family, Tensor

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (qwen2, qwen3, llama, mistral)}

__all__ = ["FAMILIES", "AttentionShape", "Family", "Tensor"]
