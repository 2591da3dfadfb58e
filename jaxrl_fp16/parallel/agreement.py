"""Do all processes of a run have the same config? Asked before any of them looks for a device."""

import hashlib
import json

import jax

from jaxrl_fp16.config import diff, to_dict

PLACE = "jaxrl_fp16/config"  # in the key-value store of the coordination service


def check_same_config(config, timeout=300):
    """Compares `config`, a config or a mapping, with that of the run's other processes; alone it does nothing.

    Every process must call it, once. It goes through the coordination service alone: nothing
    compiles, and no device is asked for.

    Args:
      timeout: seconds to wait for the other processes.

    Raises:
      ValueError: in every process, where any two differ; it names the keys. And where a process does not come.
    """
    if not jax.distributed.is_initialized():
        return
    from orbax.checkpoint import multihost  # JAX itself gives no public way to the service

    client = multihost.get_jax_distributed_client()
    text = json.dumps(to_dict(config), sort_keys=True)
    # Equal texts share a key, so however many processes there are, each reads one text of every kind.
    client.key_value_set(f"{PLACE}/{hashlib.sha256(text.encode()).hexdigest()}", text, allow_overwrite=True)
    try:
        client.wait_at_barrier(PLACE, timeout_in_ms=int(1000 * timeout))
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"another process did not come within {timeout:g} s ({reason}); allowed: the same start in "
                         "all of them") from error
    found = [json.loads(value) for _, value in client.key_value_dir_get(PLACE)]
    if len(found) > 1:
        changed = list(diff(*found[:2]).items())
        shown = "; ".join(f"{key} is {one!r} in one and {other!r} in another" for key, (one, other) in changed[:3])
        raise ValueError(f"their configs differ: {shown}; allowed: one config for all of them")
