#!/usr/bin/env bash
# A run on this machine's NVIDIA GPUs: checks the driver, makes the environment with JAX's CUDA
# build, checks that JAX sees the GPUs, and starts.
#
#   launch/gpu.sh [COMMAND] CONFIG [--key.subkey VALUE ...]      COMMAND: train (the default), or any other
#
#   DETERMINISTIC=0     faster kernels, at the price given below
#   XLA_FLAGS, XLA_PYTHON_CLIENT_MEM_FRACTION     yours come last, and so win
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

case "${1:-}" in
    --help | -h) show_help; exit 0 ;;
    "") show_help >&2; exit 2 ;;
esac
command=train
if names_command "$1"; then command="$1"; shift; fi

# --- driver ---------------------------------------------------------------------------------------
command -v nvidia-smi >/dev/null || refuse "nvidia-smi was not found: no NVIDIA driver here"
gpus="$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null)" || gpus=""
[[ -n "$gpus" ]] || refuse "nvidia-smi lists no GPU: its driver is not loaded"
count="$(grep -c . <<<"$gpus")"
driver="$(head -n 1 <<<"$gpus" | sed 's/.*, *//')"
# 525 is the first driver that CUDA 12 runs on, and the extra `gpu` is built for CUDA 12.
[[ "${driver%%.*}" -ge 525 ]] || refuse "driver $driver is too old: CUDA 12 needs 525 or later"

make_environment gpu

# --- flags ----------------------------------------------------------------------------------------
flags=()
if [[ "${DETERMINISTIC:-1}" != 0 ]]; then
    # The same program gives the same bits in each run: no atomic additions in scatters and
    # reductions, and no kernel chosen by a race between candidates. Without it, sampler and update
    # may take other kernels in each process, and with them another mismatch; a resumed run is then
    # not the run that was never stopped. Its price is slower scatters and untuned matmuls (docs/gpu.md).
    flags+=(--xla_gpu_deterministic_ops=true)
fi
if [[ "$count" -gt 1 ]]; then
    # Collectives of the mesh run while matmuls do; costs some memory, and one GPU has none to hide.
    flags+=(--xla_gpu_enable_latency_hiding_scheduler=true)
fi
export XLA_FLAGS="${flags[*]-} ${XLA_FLAGS:-}"
# A GPU that JAX cannot use must stop the run, not move it to the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"

# --- JAX's view and its share of the memory --------------------------------------------------------
# JAX takes three quarters of the memory by default. The driver keeps 0.08 of it; an engine beside JAX that samples
# (rollout.engine) has rollout.memory_fraction.
share="$(XLA_PYTHON_CLIENT_PREALLOCATE=false "$VENV/bin/python" - "$command" "$@" <<'PYTHON'
import sys
import jax
import jaxlib
from jaxrl_fp16.cli import lengthened
from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.training.runs.run_config import load_for, memory_share
try:
    devices = jax.devices("gpu")
except RuntimeError as error:
    sys.exit(str(error).splitlines()[0])
print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {len(devices)} x {devices[0].device_kind}", file=sys.stderr)
command, *arguments = sys.argv[1:]
try:
    share = memory_share(load_for(command, arguments[0], list(lengthened(command, arguments[1:]))), 0.92, command)
except (ConfigError, IndexError):   # which the command itself says
    share = 0.92
print(f"{share:.2f}")
PYTHON
)" || refuse "JAX sees no GPU (driver $driver)"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-$share}"
say "driver $driver; XLA_FLAGS: $XLA_FLAGS; JAX's share of the memory: $XLA_PYTHON_CLIENT_MEM_FRACTION"

exec "$VENV/bin/jaxrl-fp16" "$command" "$@" --platform gpu
