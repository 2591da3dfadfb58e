#!/usr/bin/env bash
# A run on this host's TPU chips: checks that there are some, makes the environment with JAX's TPU
# build, checks that JAX sees them, and starts. Precision is BF16 there; FP16 is refused.
#
#   launch/tpu.sh [COMMAND] CONFIG [--key.subkey VALUE ...]      COMMAND: train (the default), or any other
#
#   XLA_FLAGS, LIBTPU_INIT_ARGS     yours are kept
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

case "${1:-}" in
    --help | -h) show_help; exit 0 ;;
    "") show_help >&2; exit 2 ;;
esac
command=train
if names_command "$1"; then command="$1"; shift; fi

# --- chips ----------------------------------------------------------------------------------------
# A TPU VM shows its chips as /dev/accel0 ..., newer kinds through /dev/vfio/0 ....
compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null ||
    refuse "neither /dev/accel* nor /dev/vfio/* is here: this host has no TPU chips"

make_environment tpu

# --- flags ----------------------------------------------------------------------------------------
# None is set: none has been measured by us to help on a TPU.
# A TPU that JAX cannot use must stop the run, not move it to the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"

# --- JAX's view -------------------------------------------------------------------------------------
"$VENV/bin/python" - >&2 <<'PYTHON' || refuse "JAX sees no TPU; is another process holding it?"
import sys
import jax
import jaxlib
try:
    devices = jax.local_devices(backend="tpu")
except RuntimeError as error:
    sys.exit(str(error).splitlines()[0])
print(f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {len(devices)} x {devices[0].device_kind} on this host")
PYTHON

exec "$VENV/bin/jaxrl-fp16" "$command" "$@" --platform tpu
