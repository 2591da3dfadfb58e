"""The longest rows that a command may make, against the positions that a model's weights were made for."""

from jaxrl_fp16.config import ConfigError


def check_positions(config, command, limit, model="model"):
    """Refuses rows beyond `limit` positions, unless `model.allow_longer`. None, as a limit: the weights know none.

    model: whose limit it is, for the refusal.
    """
    if limit is None or config.model.allow_longer:
        return
    for keys, values in ROWS[command](config):
        if sum(values) > limit:
            parts = "" if len(values) == 1 else f"{' + '.join(map(str, values))} = "
            raise ConfigError(
                f"{keys} is {parts}{sum(values)} tokens, and the {model}'s weights were made for {limit} positions "
                "(max_position_embeddings); allowed: at most these, or model.allow_longer true"
            )


def _sampled(config):
    t, s = config.training, config.sampling
    return [("training.max_prompt_tokens + sampling.max_new_tokens", (t.max_prompt_tokens, s.max_new_tokens))]


def _evaluated(config):
    t, new = config.training, config.evaluation.max_new_tokens
    if not config.evaluation.sets or new is None:
        return _sampled(config) if config.evaluation.sets else []
    return [("training.max_prompt_tokens + evaluation.max_new_tokens", (t.max_prompt_tokens, new))]


def _looked_at(config):
    t, new = config.training, min(config.info.max_new_tokens, config.sampling.max_new_tokens)
    return [("training.max_prompt_tokens + info.max_new_tokens", (t.max_prompt_tokens, new))]


def _supervised(config):
    return [("sft.max_length", (config.sft.max_length,))]


def _warm(config):
    return _supervised(config) if config.sft.steps else []


def _paired(config):
    return [("dpo.max_length", (config.dpo.max_length,))]


def _judged(config):
    return [("task.reward_model.max_length", (config.task.reward_model.max_length,))]


# What makes rows -> `config -> [(keys, their values)]`. All but the last are commands.
ROWS = {
    "train": lambda config: [*_sampled(config), *_evaluated(config), *_warm(config)],
    "sft": lambda config: [*_supervised(config), *_evaluated(config)],
    "warmup": lambda config: [*_supervised(config), *_evaluated(config)],
    "dpo": lambda config: [*_paired(config), *_evaluated(config), *_warm(config)],
    "generate": _sampled,
    "filter": _sampled,
    "mismatch": _sampled,
    "plan": _sampled,
    "eval": _evaluated,
    "info": _looked_at,
    "reward model": _judged,
}
