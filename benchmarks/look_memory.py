"""Memory of the programs that look at ranges, against that of one microbatch's gradient. Compiled, not run.

    JAX_PLATFORMS=cpu python benchmarks/look_memory.py [--rows 8] [--columns 1024]

Arguments, temporaries and outputs by XLA's `memory_analysis`, for the shapes of Qwen2.5-1.5B and SmolLM2-135M in FP16.
"""

from __future__ import annotations

import argparse

import jax

from jaxrl_fp16.forward import score
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.telemetry.ranges import make_peaks, make_ranges
from jaxrl_fp16.training.updates.sft_update import SFTRows, sft_loss
from record import record

SHAPES = {
    "Qwen2.5-1.5B": DecoderConfig(
        family="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, tie_embeddings=True),
    "SmolLM2-135M": DecoderConfig(
        family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
        num_kv_heads=3, head_dim=64, tie_embeddings=True),
}
FP16 = get_precision("fp16").policy


def loss_of(logprobs, entropy, rows, total):
    return sft_loss(logprobs, rows, total)


def gradient(model):
    """The program that one microbatch of an update is."""
    def scaled(params, scale, rows, total):
        return scale * loss_of(score(model, params, rows.tokens, rows.mask, FP16)[0], None, rows, total)

    return jax.jit(jax.grad(scaled))


def gibibytes(program, *shapes):
    found = program.lower(*shapes).compile().memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes) / 2**30


def measure(name, rows, columns):
    """A row of the table."""
    model = Decoder(SHAPES[name])
    number = jax.ShapeDtypeStruct((), "float32")
    array = lambda dtype: jax.ShapeDtypeStruct((rows, columns), dtype)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    shapes = params, number, SFTRows(array("int32"), array("bool"), array("bool")), number
    programs = {"gradient": gradient(model)}
    programs |= {"ranges": make_ranges(model, FP16, loss_of), "first_not_finite": make_peaks(model, FP16, loss_of)}
    found = {key: gibibytes(program, *shapes) for key, program in programs.items()}
    ratios = {f"{key}_by_gradient": found[key] / found["gradient"] for key in list(found)[1:]}
    return {"model": name, "layers": model.config.num_layers, **{f"{key}_gib": size for key, size in found.items()},
            **ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--columns", type=int, default=1024)
    given = parser.parse_args()
    rows = [measure(name, given.rows, given.columns) for name in SHAPES]
    print(record("look_memory", rows, vars(given) | {"bound": 1.3}))


if __name__ == "__main__":
    main()
