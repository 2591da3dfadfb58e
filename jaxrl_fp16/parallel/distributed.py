"""Starting one run in several processes, one for each host or GPU."""

import ipaddress
import os

import jax
from jax.experimental import multihost_utils
import numpy as np

ENVIRONMENT = {
    "coordinator": "JAXRL_COORDINATOR",
    "num_processes": "JAXRL_NUM_PROCESSES",
    "process_id": "JAXRL_PROCESS_ID",
}

LOST_PROCESS = (
    "another process of the run ended or does not answer; look at its output, then start all of them again with "
    "--resume"
)
# What the libraries below say of it, each in its own words.
LOSS_WORDS = (
    "gloo", "nccl", "heartbeat", "coordination service", "connection reset", "connection closed", "unavailable",
)


def initialize_distributed(coordinator=None, num_processes=None, process_id=None, timeout=300, heartbeat=60):
    """Joins the run's other processes; does nothing where there are none. Before any other use of JAX.

    Args:
      coordinator: `host:port` of process 0, or `auto`: SLURM, Open MPI, Kubernetes
        and TPU pods are asked for all three. Default: the variable JAXRL_COORDINATOR.
      num_processes, process_id: how many there are, and which one this is, from 0.
        Default: JAXRL_NUM_PROCESSES and JAXRL_PROCESS_ID. JAX itself reads
        neither from the environment.
      timeout: seconds to wait for the others at the start.
      heartbeat: seconds of silence after which a process counts as dead and the others stop.

    Returns:
      True if this process now belongs to a run of several.

    Raises:
      ValueError: some of the three are given and others are not, or they make no sense.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    for name, variable in ENVIRONMENT.items():
        given[name] = os.environ.get(variable) if given[name] is None else given[name]
    timeouts = dict(initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat)
    if all(value is None for value in given.values()):
        return False
    if given["coordinator"] == "auto":
        jax.distributed.initialize(**timeouts)
        return jax.process_count() > 1
    address, count, index = _checked(given)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=count,
        process_id=index,
        # JAX would listen on every interface, even for a run within this host.
        coordinator_bind_address=address if _is_loopback(address) else None,
        **timeouts,
    )
    return count > 1


def from_first_process(make, size=4096):
    """`make() -> str` of process 0, in every process; it is called in no other one. Up to `size` bytes of UTF-8.

    Raises what `make` raises in process 0, and a ValueError with its text in the others.
    """
    if jax.process_count() == 1:
        return make()
    text, failure = "", None
    if jax.process_index() == 0:
        try:
            text = "=" + make()
        except Exception as error:
            text, failure = f"!{error}", error
    data = np.zeros(size, np.uint8)
    encoded = np.frombuffer(text.encode()[:size], np.uint8)
    data[: len(encoded)] = encoded
    sent = multihost_utils.broadcast_one_to_all(data).tobytes().rstrip(b"\0").decode(errors="replace")
    if failure is not None:
        raise failure
    if sent.startswith("!"):
        raise ValueError(sent[1:])
    return sent[1:]


def is_lost_process(error):
    """Whether an exception says that another process of this run is gone. Collectives of a CPU raise a ValueError."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return False
    text = str(error).lower()
    return any(word in text for word in LOSS_WORDS)


def _checked(given):
    missing = [name for name, value in given.items() if value is None]
    if missing:
        hint = ", ".join(f"{name} ({ENVIRONMENT[name]})" for name in missing)
        raise ValueError(f"a run of several processes lacks {hint}; "
                         f"allowed: all of {', '.join(given)}, or none")
    address = str(given["coordinator"])
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator is {address!r}; allowed: host:port, or auto")
    count, index = (_integer(name, given[name]) for name in ("num_processes", "process_id"))
    if not 0 <= index < count:
        raise ValueError(f"process_id is {index}; allowed: 0 to num_processes - 1, here {count - 1}")
    return address, count, index


def _integer(name, value):
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; allowed: an integer") from None


def _is_loopback(address):
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
