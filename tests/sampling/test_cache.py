"""What the sampler's program makes of its caches: none but the one that it carries."""

import re

import jax
import numpy as np
import pytest

from jaxrl_fp16.models import Decoder, DecoderConfig, param_shapes
from jaxrl_fp16.models.attention import BLOCK
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig, make_sampler


@pytest.mark.parametrize("precision, stored", [("fp16", "f16"), ("bf16", "u16")])
def test_the_cache_is_updated_in_place(precision, stored):
    """The compiled decode loop makes no array of a cache's shape but by the write itself, and the
    whole program has no room for the caches twice."""
    rows, new, slots, depth = 8, 40 * BLOCK, 41 * BLOCK, 4
    model = Decoder(DecoderConfig(
        family="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=depth, num_heads=4,
        num_kv_heads=2, head_dim=4, tie_embeddings=True))
    config = SamplingConfig(max_new_tokens=new, group_size=rows)
    sample = make_sampler(model, get_precision(precision).policy, config, eos_id=1, pad_id=0)
    prompts = np.arange(2, 8, dtype=np.int32)[None]
    program = sample.lower(param_shapes(model), prompts, prompts > 0, jax.random.key(7)).compile()
    shape = rf"{stored}\[{rows},2,(?:{slots},4|4,{slots})\]"
    made_by = set(re.findall(rf"%(\S+) = {shape}\S* [\w-]+\(", decode_loop(program.as_text(), shape)))
    assert made_by and all(name.startswith(("get-tuple-element", "wrapped_scatter")) for name in made_by)
    layer = 2 * rows * 2 * slots * 4  # keys and values
    # XLA's CPU backend multiplies in float32: one layer's cache at a time is there so too, and its scores.
    assert program.memory_analysis().temp_size_in_bytes < 2 * layer * depth + 1.5 * 4 * layer < 2 * 2 * layer * depth


def decode_loop(text, shape):
    """The body of the while loop whose carry holds a cache."""
    name = next(re.search(r"body=%?([\w.\-]+)", line).group(1) for line in text.splitlines()
                if re.search(r"\bwhile\(", line) and re.search(shape, line))
    return re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S).group(0)
