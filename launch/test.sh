#!/usr/bin/env bash
# The tests: makes the environment with what they need, then runs pytest.
#
#   launch/test.sh [PYTEST FLAG OR PATH ...]      e.g. -k checkpoint, -n 0 --pdb, tests/objectives
#   launch/test.sh --fast [...]                   without those that compile whole models: under two CPU minutes
#
# Two worker processes, since JAX keeps about two cores busy in each. JAX_PLATFORMS=cuda,cpu runs
# on a GPU, with the tests that need one.
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    show_help
    exit 0
fi
selected=()
if [[ "${1:-}" == --fast ]]; then
    selected=(-m "not slow")
    shift
fi
make_environment test
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
cd -- "$ROOT"
# A file's tests stay in one worker, which compiles what they share once; files keep their order, in
# which a short one is the last. Flags of the caller come last, and so win.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder ${selected[@]+"${selected[@]}"} "$@"
