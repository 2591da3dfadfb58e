#!/usr/bin/env bash
# The compilers for GPUs and TPUs, for machines that have neither: `jaxrl-fp16 plan` and the tests in tests/aot use them.
#
#   launch/compilers.sh [gpu] [tpu]       both without a word; into .venv/compilers, about 0.5 GB each
#
# They are packages for this environment's JAX, kept out of it: inside, every process would look for a device.
# JAXRL_FP16_COMPILERS=/path/to/folder chooses another folder, here and for those who use it.
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    show_help
    exit 0
fi
folder="${JAXRL_FP16_COMPILERS:-$VENV/compilers}"
[[ $# -gt 0 ]] || set -- gpu tpu
for kind in "$@"; do
    [[ "$kind" == gpu || "$kind" == tpu ]] || refuse "$kind is no kind of compiler; allowed: gpu, tpu"
done
make_environment

# What `pip install` takes for this JAX: its own version of the plugin, and the libtpu that it asks for.
packages() { # KIND
    "$VENV/bin/python" - "$1" <<'PYTHON'
from importlib.metadata import requires, version
import sys
if sys.argv[1] == "gpu":
    print(f"jax-cuda12-plugin=={version('jax')} jax-cuda12-pjrt=={version('jax')} nvidia-cuda-nvcc-cu12")
else:
    print(next(line.partition(";")[0].strip() for line in requires("jax") if line.startswith("libtpu")))
PYTHON
}

# install_compiler KIND PLACE: whole or not at all; what is there for these packages stays.
install_compiler() {
    local wanted place="$folder/$2"
    wanted="$(packages "$1")"
    if [[ "$(cat "$place/.packages" 2>/dev/null)" == "$wanted" ]]; then return; fi
    say "installing $wanted into $place"
    rm -rf -- "$place" "$place.new"
    # Without what they depend on: CUDA's libraries, gigabytes that a compiler does not call.
    # shellcheck disable=SC2086
    run_pip install --no-deps --target "$place.new" $wanted
    printf '%s\n' "$wanted" >"$place.new/.packages"
    mv -- "$place.new" "$place"
}

mkdir -p -- "$folder"
for kind in "$@"; do
    case "$kind" in
    gpu) install_compiler gpu cuda ;;
    tpu) install_compiler tpu tpu ;;
    esac
done
printf '%s\n' "$folder"
