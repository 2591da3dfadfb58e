"""On a GPU: what decoding and updating cost, against what the card can do at all.

    python benchmarks/gpu/speed.py [--model 1.5B] [--rows 64] [--slots 512 2048 8192] [--columns 2048 8192]

Ceilings: a device-to-device copy, and an 8,192-cubed matmul in fp16 and bf16. A decode step must read the weights in
half precision and the whole cache once: `of_copy` is the share of the copy's bytes a second. An update's FLOPs are 6 a
weight and token, and attention's causal half; recomputation by remat is not counted: `of_matmul` is the share of the
matmul's rate.
"""

import math
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_fp16 as rl
from jaxrl_fp16.forward import cast_to_compute, in_compute_dtype, logits_of
from jaxrl_fp16.models.attention import stored
from jaxrl_fp16.models.decoder import Cache, decode_step, layers_of, unstack_layers
from jaxrl_fp16.sampling.support import draw
from qwen import Results, arguments, decoder, params_of, seconds, sizes

STEPS = 32  # of the decode loop in one program


def copy_rate(count):
    """Bytes read and written a second, of `count` float32 numbers."""
    x = jnp.ones(count, jnp.float32)
    run = jax.jit(lambda x: x + 1)
    found = seconds(lambda: run(x).block_until_ready(), 10)
    return {"bytes_per_second": 8 * count / found["seconds"], **found}


def matmul_rate(side, dtype):
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), dtype) for seed in (0, 1))
    run = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(dtype))
    found = seconds(lambda: run(a, b).block_until_ready(), 20)
    return {"flop_per_second": 2 * side**3 / found["seconds"], **found}


def decode_program(model, params, precision, rows, slots):
    """`(run, bytes a step)`: STEPS steps at the end of caches of `slots` slots, drawing a token a row each."""
    c, policy = model.config, rl.get_precision(precision).policy
    compute = jax.jit(lambda x: cast_to_compute(x, policy, model.numerics))(params)
    half, sampling = in_compute_dtype(model, policy), rl.SamplingConfig(max_new_tokens=STEPS, group_size=1)
    shape = rows, c.num_kv_heads, slots, c.head_dim
    keys = jax.random.split(jax.random.key(0), rows)

    def filled(seed):
        return jax.random.normal(jax.random.key(seed), shape, policy.compute_dtype)

    caches = [Cache(*stored(half.attention, filled(2 * i), filled(2 * i + 1))) for i in range(c.num_layers)]

    def loop(params, caches, token):
        layers = unstack_layers(layers_of(params), c.num_layers)

        def step(number, carry):
            token, caches = carry
            at = jnp.full(rows, slots - STEPS, jnp.int32) + number
            hidden, caches = decode_step(half, params, layers, token, caches, at)
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return draw(sampling, logits_of(hidden, params["head"])[:, 0], drawn)[0], caches

        return lax.fori_loop(0, STEPS, step, (token, caches))

    program = jax.jit(loop, donate_argnums=1)
    token = jnp.full(rows, 5, jnp.int32)

    def run():
        nonlocal token, caches
        token, caches = jax.block_until_ready(program(compute, caches, token))

    weights = sum(sizes(c)) * 2
    return run, weights + 2 * c.num_layers * math.prod(shape) * 2


def measure_decode(model, params, precision, rows, slots, copied):
    run, needed = decode_program(model, params, precision, rows, slots)
    found = seconds(run, 3)
    each = found["seconds"] / STEPS
    return {"ms_per_step": 1e3 * each, "tokens_per_second": rows / each, "bytes": needed,
            "of_copy": needed / each / copied, "first": found["first"]}


def update_program(model, params, precision, rows, columns, micro):
    """`(run, FLOPs)` of one whole optimizer step of GRPO."""
    c, chosen = model.config, rl.get_precision(precision)
    generator = np.random.default_rng(0)
    mask = np.ones((rows, columns), bool)
    response = np.broadcast_to(np.arange(columns) >= columns // 8, mask.shape)
    logprobs = np.full(mask.shape, -5.0, np.float32)
    batch = jax.tree.map(jnp.asarray, rl.Batch(
        tokens=generator.integers(2, c.vocab_size, mask.shape).astype(np.int32), mask=mask, response_mask=response,
        rollout_logprobs=logprobs, old_logprobs=logprobs,
        advantages=generator.normal(size=rows).astype(np.float32),
    ))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    update = rl.make_update(model, chosen.policy, rl.get_algorithm("grpo"), optimizer, microbatch_size=micro)
    state = rl.init_train_state(jax.tree.map(lambda x: x.copy(), params), optimizer, chosen.loss_scale,
                                jax.random.key(0))

    def run():
        nonlocal state
        state, metrics = jax.block_until_ready(update(state, batch))
        return metrics

    tokens, heads = rows * columns, c.num_heads * c.head_dim
    return run, 6 * sum(sizes(c)) * tokens + 3 * c.num_layers * 2 * heads * columns * tokens


def measure_update(model, params, precision, rows, columns, micro, matmul):
    run, flops = update_program(model, params, precision, rows, columns, micro)
    found = seconds(run, 2)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    rate = flops / found["seconds"]
    return {"rows": rows, "micro": micro, "step_seconds": found["seconds"], "tflop_per_second": rate / 1e12,
            "of_matmul": rate / matmul, "positions_per_second": rows * columns / found["seconds"],
            "peak_gib_so_far": peak / 2**30, "first": found["first"]}


def main():
    given = arguments(__doc__, model="1.5B", rows=64, slots=[512, 2048, 8192], columns=[2048, 8192],
                      attention=["cudnn", "blockwise", "plain"], precisions=["fp16", "bf16"], positions=16384, remat=1,
                      side=8192, copied=2**30, limit=1e9, name="gpu_speed")
    results, began = Results(given.name, vars(given)), time.monotonic()
    results.add({"what": "copy"}, copy_rate, given.copied)
    for name in given.precisions:
        results.add({"what": "matmul", "precision": name}, matmul_rate, given.side,
                    rl.get_precision(name).policy.compute_dtype)
    copied = results.rows[0]["bytes_per_second"]
    matmul = max(row["flop_per_second"] for row in results.rows[1:])
    params = params_of(decoder(given.model, "plain"))
    todo = [("decode", size, kind, name) for kind in given.attention for name in given.precisions
            for size in given.slots]
    todo += [("update", size, kind, name) for kind in given.attention for name in given.precisions
             for size in given.columns]
    # The half precision that this library is for, and the sizes that say most, come first.
    todo.sort(key=lambda job: (job[3] != given.precisions[0], given.attention.index(job[2]), job[0], job[1]))
    for what, size, kind, name in todo:
        row = {"what": what, "model": given.model, "attention": kind, "precision": name, "remat": given.remat,
               "slots" if what == "decode" else "columns": size}
        if time.monotonic() - began > given.limit:
            results.add({**row, "left_out": "no time"})
            continue
        model = decoder(given.model, kind, bool(given.remat))
        if what == "decode":
            results.add(row, measure_decode, model, params, name, given.rows, size, copied)
        else:
            rows = max(given.positions // size, 1)
            micro = max(8192 // size, 1)
            results.add(row, measure_update, model, params, name, rows, size, min(micro, rows), matmul)


if __name__ == "__main__":
    main()
