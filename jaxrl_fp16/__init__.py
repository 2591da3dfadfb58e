"""RL fine-tuning of language models in JAX, in FP16: one numerics for sampling and training.

Names are resolved when they are first used; importing has no effects.
"""

from importlib import import_module

_HOMES = {
    "types": ("Rollout", "Batch"),
    "precision": ("get_precision", "Precision", "LossScale", "LossScaleConfig"),
    "models": (
        "Decoder", "DecoderConfig", "NumericsConfig", "RopeScaling", "YarnScaling", "Critic", "critic_params",
        "init_params", "load_pretrained", "save_pretrained", "load_reward_model", "save_reward_model",
        "LoraConfig", "init_lora", "merge_lora", "load_adapter", "read_adapter", "save_adapter",
    ),
    "tokenizer": ("load_tokenizer", "encode_prompts", "decode_responses"),
    "forward": ("token_logprobs", "token_values", "sequence_scores", "logits"),
    "sampling": ("SamplingConfig", "make_sampler"),
    "objectives": (
        "AlgorithmConfig", "get_algorithm", "group_advantages", "gae", "policy_loss", "value_loss",
        "mismatch_metrics", "PreferenceConfig", "dpo_loss", "pairwise_reward_loss",
    ),
    "tasks": ("math_reward", "open_grader"),
    "training.updates": (
        "TrainState", "init_train_state", "make_update", "make_value_update", "PreferencePairs", "make_pair_scorer",
        "make_dpo_update", "RewardPairs", "make_reward_update",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"jaxrl_fp16 has no {name!r}; it has: {', '.join(__all__)}")
    return getattr(import_module(f"jaxrl_fp16.{_HOME_OF[name]}"), name)


def __dir__():
    return __all__
