"""On a GPU: does a row's result depend on how many rows there are? Products and attention of one shape, bit by bit.

    python benchmarks/gpu/invariance.py [--model 1.5B] [--most 4096]

`exact`: the share of numbers, in half precision, that a product of the first M rows shares to the bit with the product
of all `most` rows. `tiled_ms`: all rows in tiles of M, one after another, against `whole_ms`: what the same kernel for
every row would cost.
"""

from functools import partial

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.models.attention import BLOCK, attend, attend_cache, stored
from jaxrl_fp16.models.layers import matmul
from qwen import SHAPES, Results, arguments, seconds

DTYPES = {"fp16": jnp.float16, "bf16": jnp.bfloat16}


def product(x, w):
    return matmul("md,dn->mn", x, w).astype(x.dtype)


def tiled(x, w, tile):
    return lax.map(lambda part: product(part, w), x.reshape(-1, tile, x.shape[1])).reshape(len(x), -1)


def _wait_for(run, *args):
    run(*args).block_until_ready()


def measure_product(inner, outer, dtype, rows, most):
    x = jax.random.normal(jax.random.key(0), (most, inner), dtype)
    w = (jax.random.normal(jax.random.key(1), (inner, outer)) * inner**-0.5).astype(dtype)
    run, cut = jax.jit(product), jax.jit(tiled, static_argnums=2)
    whole = run(x, w)
    found = {"whole_ms": 1e3 * seconds(lambda: run(x, w).block_until_ready(), 5)["seconds"]}
    for count in rows:
        part = np.asarray(run(x[:count], w))
        found[f"exact_{count}"] = float(np.mean(part == np.asarray(whole)[:count]))
        if count >= 16:
            in_tiles = np.asarray(cut(x, w, count))
            found[f"tile_is_itself_{count}"] = float(np.mean(in_tiles[:count] == part))
            found[f"tiled_ms_{count}"] = 1e3 * seconds(partial(_wait_for, cut, x, w, count), 5)["seconds"]
    return found


def measure_attention(kind, shape, dtype, rows, columns):
    s = SHAPES[shape]
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (rows, columns, s["num_heads"], s["head_dim"]), dtype)
    k, v = (jax.random.normal(key, (rows, s["num_kv_heads"], columns, s["head_dim"]), dtype) for key in keys[1:])
    full = np.asarray(jax.jit(lambda *x: attend(kind, *x))(q, k, v))
    few = np.asarray(jax.jit(lambda *x: attend(kind, *x))(q[:1], k[:1], v[:1]))
    at = jnp.full(rows, columns - 1, jnp.int32)
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, -columns % BLOCK), (0, 0))) for x in (k, v))
    last = np.asarray(jax.jit(lambda *x: attend_cache(kind, *x))(q[:, -1:], *stored(kind, k, v), at))
    return {"exact_decode": float(np.mean(last[:, 0] == full[:, -1])), "exact_one_row": float(np.mean(few == full[:1])),
            "largest": float(np.abs(last[:, 0].astype(np.float64) - full[:, -1].astype(np.float64)).max())}


def main():
    given = arguments(__doc__, model="1.5B", most=4096, rows=[1, 8, 16, 64, 128, 256, 1024],
                      attention=["cudnn", "blockwise", "plain"], columns=[64, 200, 1000], attention_rows=64,
                      name="gpu_invariance")
    results, s = Results(given.name, vars(given)), SHAPES[given.model]
    width, heads = s["hidden_size"], s["num_heads"] * s["head_dim"]
    shapes = {"q": (width, heads), "k": (width, s["num_kv_heads"] * s["head_dim"]), "o": (heads, width),
              "up": (width, s["intermediate_size"]), "down": (s["intermediate_size"], width),
              "head": (width, s["vocab_size"])}
    for precision, dtype in DTYPES.items():
        for name, (inner, outer) in shapes.items():
            most = given.most if name != "head" else min(given.most, 1024)
            rows = [count for count in given.rows if count < most]
            results.add({"what": name, "precision": precision, "inner": inner, "outer": outer, "most": most},
                        measure_product, inner, outer, dtype, rows, most)
        for kind in given.attention:
            for columns in given.columns:
                results.add({"what": "attention", "kind": kind, "precision": precision, "columns": columns},
                            measure_attention, kind, given.model, dtype, given.attention_rows, columns)


if __name__ == "__main__":
    main()
