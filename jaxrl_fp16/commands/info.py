"""`info`: is this model safe in FP16? Its weights, activations and gradients against float16's range.

B: rows.  T: columns.  L: layers.
"""

from functools import partial
import json
import math
from pathlib import Path

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.config import ConfigError, naming
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import plain, write_json
from jaxrl_fp16.objectives import needs_reference, normalizer_of
from jaxrl_fp16.parallel import row_shards, shard_batch, to_host
from jaxrl_fp16.precision import get_policy
from jaxrl_fp16.telemetry import by_tensor, first_overflow, largest, margin, underflow_share, weight_shares
from jaxrl_fp16.telemetry.ranges import LARGEST, dtype_of, make_ranges, module_names, weight_ranges
from jaxrl_fp16.tokenizer import encode_completions, encode_prompts
from jaxrl_fp16.training.rollouts.collect import rendered
from jaxrl_fp16.training.rollouts.engine import make_engine
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.runs.setup import opened, set_up_alone
from jaxrl_fp16.training.updates.policy_update import loss_of_rows
from jaxrl_fp16.types import Batch

FP16 = get_policy("fp16")
SHOWN = 8  # tensors in a table; the file holds them all
MODULES = {"attention_norm": "norm", "mlp_norm": "norm"}  # heads of columns; the others are the last part of the name


def run_info(config):
    """Prints tables, the figures as one JSON line, and the answer in the last one; writes no file but `info.output`.

    That file holds the figures of every tensor and module too.
    """
    output = config.info.output
    if output is not None and not Path(output).parent.is_dir():
        raise ConfigError(f"info.output: the folder of {output} does not exist; allowed: a file in one that does")
    with naming("algorithm"):
        resolve_algorithm(config)
    setup, log = set_up_alone("info", config), Console()
    with opened(setup) as bench:
        model = bench.model
        check_positions(setup.config, "info", model.config.max_positions)
        with log.announce("loading the model"):
            params = bench.load_params(any_weights=True)
        weights = by_tensor(model, jax.tree.map(to_host, weight_ranges(params)))
        found = None
        if all(math.isfinite(each.peak) for _, each in weights):  # else every activation is NaN
            with log.announce("computing activations and gradients"):
                rows, origin = _rows(bench, params)
                found, scale = _look(setup, model, params, rows)
    facts = {"model": setup.config.model.path or "random weights", "weights": _of_weights(weights)}
    if found is not None:
        facts |= {"responses": origin, "rows": len(rows.tokens), "tokens": int(np.sum(rows.mask)),
                  "activations": _of_activations(model, found), "gradients": _of_gradients(model, found, scale)}
    facts = {**_verdict(facts), **facts}
    _show(log, model, facts)
    if output is not None:
        write_json(output, facts)
    log.say(json.dumps(plain(_without_tables(facts)), allow_nan=False))
    log.say(facts["verdict"])
    return 0


# -- rows and their loss -------------------------------------------------------------------------


def _rows(bench, params):
    """`(Batch on the host, where its responses come from)`: the solutions where every problem has one, else sampled.

    Advantages are 1 and -1 in turn; log-probs are filled in by the loss.
    """
    setup, task, config = bench.setup, bench.task, bench.setup.config
    examples = list((task.heldout or task.train)[: config.info.rows])
    examples += examples[:1] * (-len(examples) % row_shards(setup.mesh))
    prompts, flaws = rendered(task, examples, setup.tokenizer)
    length = config.training.max_prompt_tokens
    if all(example.solution for example in examples):
        tokens, mask, response, kept = encode_completions(
            setup.tokenizer, prompts, [example.solution for example in examples],
            length + config.sampling.max_new_tokens, setup.eos_ids,
        )
        origin = "the task's solutions"
    else:
        tokens, mask, kept = encode_prompts(setup.tokenizer, prompts, length)
        tokens, mask, response = _sampled(bench, params, tokens, mask | ~kept[:, None])
        origin = "sampled"
    if not kept.any():
        raise ConfigError(
            f"info: none of {len(prompts)} prompts fits into training.max_prompt_tokens = {length}; "
            "allowed: a larger limit"
        )
    if all(flaws):
        raise ConfigError(f"info: none of {len(prompts)} problems makes a prompt: the first is {flaws[0]}; allowed: "
                          "problems with a text, and a template that shows it")
    response = response & kept[:, None]
    zeros, signs = np.zeros(tokens.shape, np.float32), np.where(np.arange(len(tokens)) % 2, -1.0, 1.0)
    return Batch(tokens, mask, response, zeros, zeros, signs.astype(np.float32)), origin


def _sampled(bench, params, tokens, mask):
    """`(tokens, mask, response_mask)` on the host: one response to each prompt, in the sampler's precision."""
    s, limit = bench.setup.config.sampling, bench.setup.config.info.max_new_tokens
    sampling = s.__class__(max_new_tokens=min(s.max_new_tokens, limit), temperature=s.temperature, group_size=1,
                           end_tokens=s.end_tokens)
    engine = make_engine(bench.setup, bench.model, sampling, engine="jit")
    rollout = engine(params, tokens, mask, bench.setup.keys.evaluation)
    return tuple(to_host(x) for x in (rollout.tokens, rollout.mask, rollout.response_mask))


def _look(setup, model, params, rows):
    """`(Ranges on the host, loss scale)` in float16, at the first finite scale from `loss_scale.initial` down."""
    config, algorithm = setup.config, resolve_algorithm(setup.config)
    program = make_ranges(
        model, FP16, partial(_loss_of, algorithm, config.sampling.max_new_tokens),
        temperature=config.sampling.temperature, with_entropy=algorithm.entropy_coef != 0,
    )
    # As small as in a whole minibatch, or the gradients would underflow less than in training.
    share = max(1, config.training.minibatch_size // len(rows.tokens))
    total = jax.tree.map(lambda x: x * share, normalizer_of(rows.response_mask))
    scale, placed = config.loss_scale.initial, shard_batch(rows, setup.mesh)
    while True:
        found = jax.tree.map(to_host, program(params, jnp.float32(scale), placed, total))
        finite = all(math.isfinite(each.peak) for _, each in by_tensor(model, found.gradients))
        if finite or first_overflow(model, FP16, found.activations) or scale <= config.loss_scale.minimum:
            return found, scale
        scale = max(scale * config.loss_scale.backoff, config.loss_scale.minimum)


def _loss_of(algorithm, limit, logprobs, entropy, rows, total):
    """The update's loss where sampler, scorer and reference agree with the model."""
    own = lax.stop_gradient(logprobs)
    reference = own if needs_reference(algorithm) else None
    rows = rows.replace(old_logprobs=own, rollout_logprobs=own, ref_logprobs=reference)
    return loss_of_rows(algorithm, logprobs, entropy, rows, limit, total)[0]


# -- figures and the answer ----------------------------------------------------------------------


def _of_weights(weights):
    lost, subnormal = weight_shares(weights)
    name, peak = largest((name, each.peak) for name, each in weights)
    tensors = {
        name: {"max": float(each.peak), "beyond": int(each.beyond), "lost": int(each.lost) / int(each.entries),
               "subnormal": int(each.subnormal) / int(each.entries)}
        for name, each in weights
    }
    return {"max": float(peak), "tensor": name, "margin": margin(peak, jnp.float16), "lost": lost,
            "subnormal": subnormal, "tensors": tensors}


def _of_activations(model, found):
    names = module_names(model.config.num_layers)
    rounded = [name for name in names if dtype_of(model, FP16, name) == jnp.float16]
    name, peak = largest((name, found.exact[name]) for name in rounded)
    return {"max": float(peak), "module": name, "margin": margin(peak, jnp.float16),
            "first_beyond": first_overflow(model, FP16, found.activations) or first_overflow(model, FP16, found.exact),
            "float32": {name: float(found.exact[name]) for name in names},
            "float16": {name: float(found.activations[name]) for name in names}}


def _of_gradients(model, found, scale):
    tensors = by_tensor(model, found.gradients)
    name, peak = largest((name, each.peak) for name, each in tensors)
    shares = {name: {"max": float(each.peak), "underflow": underflow_share([(name, each)])} for name, each in tensors}
    return {"loss_scale": scale, "max": float(peak), "tensor": name, "underflow": underflow_share(tensors),
            "loss": float(found.loss), "tensors": shares}


def _verdict(facts):
    """`safe` and `verdict`: the first thing that float16 does not hold, or how much room is left."""
    weights, activations, gradients = (facts.get(key) for key in ("weights", "activations", "gradients"))
    if not weights["max"] <= LARGEST:
        return _no(f"the weights {weights['tensor']} hold {weights['max']:g}; float16 ends at {LARGEST:,.0f}")
    if activations["first_beyond"] is not None:
        name = activations["first_beyond"]
        return _no(f"the activation of {name} reaches {activations['float32'][name]:g} in float32; float16 ends at "
                   f"{LARGEST:,.0f}")
    if not math.isfinite(gradients["max"]):
        return _no(f"the gradient of {gradients['tensor']} is not finite at loss scale {gradients['loss_scale']:g}")
    kind, place = max(("activation", "module"), ("weight", "tensor"), key=lambda pair: facts[pair[0] + "s"]["max"])
    largest_of = facts[kind + "s"]
    return {"safe": True, "margin": largest_of["margin"], "verdict": (
        f"FP16: yes, with a factor of {largest_of['margin']:,.3g} to {LARGEST:,.0f}: the largest is the {kind} of "
        f"{largest_of[place]}, {largest_of['max']:.3g}; {gradients['underflow']:.2%} of gradient entries underflow at "
        f"loss scale {gradients['loss_scale']:g}"
    )}


def _no(reason):
    return {"safe": False, "margin": 0.0, "verdict": f"FP16: no, {reason}"}


# -- tables --------------------------------------------------------------------------------------


def _show(log, model, facts):
    weights = facts["weights"]
    log.table(
        f"weights of {facts['model']}: {weights['lost']:.2%} lost in float16, {weights['subnormal']:.2%} subnormal",
        ("tensor", "largest", "margin", "lost", "subnormal"),
        [(name, f"{each['max']:.3g}", f"{margin(each['max'], jnp.float16):,.3g}", f"{each['lost']:.2%}",
          f"{each['subnormal']:.2%}") for name, each in _first(weights["tensors"], "max")],
    )
    if "activations" not in facts:
        return
    log.table(
        f"largest activation by layer, over {facts['tokens']} tokens of {facts['rows']} rows ({facts['responses']}), "
        "computed in float32; in brackets what float16 gives where that is not finite",
        *_by_layer(model, facts["activations"]),
    )
    gradients = facts["gradients"]
    log.table(
        f"gradients at loss scale {gradients['loss_scale']:g}: {gradients['underflow']:.2%} of the entries underflow",
        ("tensor", "largest, unscaled", "underflow"),
        [(name, f"{each['max']:.3g}", f"{each['underflow']:.2%}")
         for name, each in _first(gradients["tensors"], "underflow")],
    )


def _first(tensors, key):
    """The tensors with the largest of `key`, NaN above all."""
    ranked = sorted(tensors.items(), key=lambda item: (not math.isnan(item[1][key]), -item[1][key]))
    return ranked[:SHOWN]


def _by_layer(model, activations):
    """Columns and rows: a layer each, between embedding and last norm."""
    modules = [name.removeprefix("layers.0.") for name in module_names(1)[1:-2]]
    cell = partial(_cell, activations)
    rows = [("embedding", *[""] * len(modules), cell("embedding"))]
    for layer in range(model.config.num_layers):
        rows.append((f"layers.{layer}", *(cell(f"layers.{layer}.{module}") for module in modules),
                     cell(f"layers.{layer}")))
    heads = [MODULES.get(module, module.rpartition(".")[2]) for module in modules]
    return ("", *heads, "after"), [*rows, ("final_norm", *[""] * len(modules), cell("final_norm"))]


def _cell(activations, name):
    exact, given = activations["float32"][name], activations["float16"][name]
    return f"{exact:.3g}" if math.isfinite(given) else f"{exact:.3g} ({given:g})"


def _without_tables(facts):
    def short(value):
        return {key: item for key, item in value.items() if not isinstance(item, dict)}

    return {key: short(value) if isinstance(value, dict) else value for key, value in facts.items()}
