"""Model families, the decoder that they share, and its way from and to Hugging Face folders."""

from jaxrl_fp16.models.adapters import init_lora, merge_lora
from jaxrl_fp16.models.critic import Critic, critic_params
from jaxrl_fp16.models.decoder import Cache, Decoder, DecoderConfig
from jaxrl_fp16.models.hf.adapter_folders import load_adapter, read_adapter, save_adapter
from jaxrl_fp16.models.hf.export import save_pretrained, save_reward_model
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.families.family import Family, Tensor
from jaxrl_fp16.models.hf.load import PretrainedError, check_range, load_pretrained, load_reward_model, read_config
from jaxrl_fp16.models.init import init_params, laid_out_for_decoding, param_axes, param_shapes, param_shardings
from jaxrl_fp16.models.layers import RopeScaling, YarnScaling
from jaxrl_fp16.models.lora import LoraConfig
from jaxrl_fp16.models.numerics import NumericsConfig

__all__ = [
    "Cache",
    "Critic",
    "Decoder",
    "DecoderConfig",
    "FAMILIES",
    "Family",
    "LoraConfig",
    "NumericsConfig",
    "PretrainedError",
    "RopeScaling",
    "YarnScaling",
    "Tensor",
    "check_range",
    "critic_params",
    "init_lora",
    "init_params",
    "load_adapter",
    "load_pretrained",
    "load_reward_model",
    "laid_out_for_decoding",
    "merge_lora",
    "param_axes",
    "param_shapes",
    "param_shardings",
    "read_adapter",
    "read_config",
    "save_adapter",
    "save_pretrained",
    "save_reward_model",
]
