#!/usr/bin/env bash
# The main job on this machine, from nothing: makes the environment, warm-starts a small model on a
# built-in task, improves it by GRPO in FP16, and ends with a plot and a table of what happened.
#
#   launch/quickstart.sh [--key.subkey VALUE ...]      e.g. --precision bf16, --run.seed 1
#
# Each start makes a new run folder, under runs/ in the current folder.
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    show_help
    exit 0
fi
make_environment
exec "$VENV/bin/jaxrl-fp16" train "$ROOT/configs/quickstart.yaml" "$@"
