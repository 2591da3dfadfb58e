"""Run twice by test_mesh.py: one of the two processes of a run, with 1 CPU device in each."""

from pathlib import Path
import sys

from jaxrl_fp16.parallel import MeshConfig, initialize_distributed, make_mesh, shard_batch, to_host
from jaxrl_fp16.parallel.agreement import check_same_config


def main(folder):
    assert initialize_distributed(timeout=60)
    check_same_config({"run": {"seed": 0, "stop": ("a",)}}, timeout=60)
    # Only now: anything that asks for a device would have started JAX alone.
    import jax
    import numpy as np

    from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, load_pretrained, save_pretrained

    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 2, 1)
    mesh = make_mesh(MeshConfig(fsdp=2))
    rows = np.arange(8).reshape(4, 2)
    batch = shard_batch({"tokens": rows, "scale": 2.0}, mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(to_host(batch["tokens"]), rows)

    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2)
    model = Decoder(DecoderConfig(family="qwen3", **shape, num_heads=4, num_kv_heads=2, head_dim=8))
    params = init_params(model, jax.random.key(0), mesh)
    assert params["embedding"].addressable_shards[0].data.shape == (32, 8)
    save_pretrained(folder / "out", model, params, dtype="float32")
    _, again = load_pretrained(folder / "out", mesh=mesh)
    alone = init_params(model, jax.random.key(0))
    for leaf, read, whole in zip(*map(jax.tree.leaves, (params, again, alone)), strict=True):
        (part,), (read_part,) = leaf.addressable_shards, read.addressable_shards
        np.testing.assert_array_equal(read_part.data, part.data)
        np.testing.assert_array_equal(part.data, np.asarray(whole)[part.index])


main(Path(sys.argv[1]))
