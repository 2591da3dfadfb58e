"""FP16's gradients against FP32's, through the update and its loss scale."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.updates import init_train_state, make_update
from jaxrl_fp16.types import Batch


def tensors(grads):
    """name -> one tensor, those of stacked layers one by one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = enumerate(leaf) if name.startswith("layers") else [("", leaf)]
        yield from ((f"{name} {index}", np.asarray(part, np.float64).ravel()) for index, part in parts)


def cosines(found, expected):
    """name -> (cosine, norm of the expected tensor as a share of the largest)."""
    expected = dict(tensors(expected))
    largest = max(np.linalg.norm(x) for x in expected.values())
    result = {}
    for name, x in tensors(found):
        y = expected[name]
        share = np.linalg.norm(y) / largest
        if share > 1e-6:
            result[name] = x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), share
    return result


def test_float16_gradients_point_where_float32s_do(toy):
    """A row of one token, 8,192 times, among ragged ordinary ones."""
    columns, vocab = 8192, 64
    model = Decoder(DecoderConfig(
        family="qwen2", vocab_size=vocab, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=1, head_dim=16, tie_embeddings=True))
    params = init_params(model, jax.random.key(0))
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, vocab, (3, columns)).astype(np.int32)
    tokens[0] = 7
    mask = np.ones((3, columns), bool)
    mask[1, :1000], mask[2, 5000:] = False, False
    sampled = mask.copy()
    sampled[:, :1100] = False
    policy = get_precision("fp32").policy
    old = jax.jit(lambda *args: token_logprobs(model, *args, policy=policy))(params, tokens, mask)
    batch = Batch(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), response_mask=jnp.asarray(sampled),
                  rollout_logprobs=old, old_logprobs=old, advantages=jnp.array([1.0, -1.0, 0.5]))
    grads = {}
    for name in ("fp16", "fp32"):
        precision = get_precision(name)
        update = make_update(model, precision.policy, get_algorithm("grpo"), toy.recorder(), microbatch_size=3)
        state = init_train_state(params, toy.recorder(), precision.loss_scale, jax.random.key(0))
        state, metrics = update(state, batch)
        assert float(metrics["skipped"]) == 0
        grads[name] = state.opt_state
    found = cosines(grads["fp16"], grads["fp32"])
    worst = min(found, key=lambda name: found[name][0])
    cosine, share = found[worst]
    print(f"worst of {len(found)} tensors: {worst}, cosine {cosine:.6f}, norm {share:.1e} of the largest")
    assert cosine >= 0.999
