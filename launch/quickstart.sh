#!/usr/bin/env bash
# The main job on this machine, from nothing: makes the environment, warm-starts a small model on a
# built-in task, improves it by GRPO in FP16 and, from the same warm start, in BF16, and ends with a
# report that compares the two.
#
#   launch/quickstart.sh [--key.subkey VALUE ...]      e.g. --seeds 0 1 2, --run.steps 100
#   launch/quickstart.sh --precision bf16              one run, in that precision
#
# Each start makes a new folder under runs/ in the current folder; --resume FOLDER continues one.
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

# A precision of its own asks for one run, and what is resumed says itself what it is.
command=compare
previous=
for argument in "$@"; do
    case "$argument" in
        --help | -h)
            show_help
            exit 0
            ;;
        --precision | --precision=*) command=train ;;
    esac
    if [[ "$previous" == --resume && ! -d "$argument/configs" ]]; then command=train; fi
    previous="$argument"
done
precisions=()
if [[ "$command" == compare && " $*" != *" --precisions"* ]]; then precisions=(--precisions fp16 bf16); fi
make_environment
exec "$VENV/bin/jaxrl-fp16" "$command" "$ROOT/configs/quickstart.yaml" ${precisions[@]+"${precisions[@]}"} "$@"
