#!/usr/bin/env bash
# What there is to measure on one NVIDIA GPU, in parts of under ten minutes; each step has its own time limit, and its
# results are files in $OUT (or benchmarks/results), written as they come.
#
#   benchmarks/gpu/call.sh right      tests, the quickstart's run, the mismatch by attention
#   benchmarks/gpu/call.sh fast       decoding and updating against the card's limits and against PyTorch; kernels
#   benchmarks/gpu/call.sh paper      the paper's sanity test, shortened; the tests beside it
#
#   PYTHON=python3     the interpreter
set -uo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.."
python="${PYTHON:-python3}"
export OUT="${OUT:-$PWD/benchmarks/results}" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-/tmp/jaxcache}"
deterministic="--xla_gpu_deterministic_ops=true"

step() { # SECONDS COMMAND ...
    local limit="$1" began=$SECONDS
    shift
    timeout -k 5 "$limit" "$@"
    echo "=== $? after $((SECONDS - began)) s: $*"
}

tests() { # NAME SECONDS ARGUMENTS ...
    local name="$1" limit="$2"
    shift 2
    step "$limit" env XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_ENABLE_COMPILATION_CACHE=true \
        "$python" -m pytest -p no:cacheprovider -p no:benchmark --junit-xml "/tmp/$name.xml" "$@" >"/tmp/$name.log" 2>&1
    tail -n 3 "/tmp/$name.log"
    tail -c 2000000 "/tmp/$name.log" >"$OUT/$name.log"
    if [[ -f "/tmp/$name.xml" ]]; then
        JAX_PLATFORMS=cpu "$python" benchmarks/gpu/suite.py --name "$name" --file "/tmp/$name.xml" --what "$*" | tail -n 40
    fi
}

case "${1:-}" in
right)
    tests gpu_tests_marked 90 -m gpu -n 0 tests/models
    XLA_FLAGS="$deterministic" step 230 "$python" benchmarks/gpu/main_job.py
    tests gpu_tests 300 -n 8 tests/models tests/sampling tests/training >/tmp/tests.out 2>&1 &
    XLA_FLAGS="$deterministic" XLA_PYTHON_CLIENT_MEM_FRACTION=.6 step 310 "$python" benchmarks/gpu/mismatch.py
    wait
    cat /tmp/tests.out
    ;;
fast)
    tests gpu_tests_marked 40 -m gpu -n 0 tests/models/test_attention.py
    XLA_FLAGS="$deterministic" step 50 "$python" benchmarks/gpu/invariance.py
    step 235 "$python" benchmarks/gpu/speed.py --limit 190
    step 150 "$python" benchmarks/gpu/torch_speed.py --limit 110
    step 85 "$python" benchmarks/gpu/kernels.py
    ;;
paper)
    speed() { step "$1" "$python" benchmarks/gpu/speed.py --name "$2" "${@:3}"; }
    speed 60 gpu_speed_bf16 --attention cudnn --precisions bf16
    speed 30 gpu_speed_without_remat --attention cudnn --precisions fp16 --slots --remat 0
    speed 35 gpu_speed_plain --attention plain --precisions fp16 --slots 2048 --columns 2048
    XLA_FLAGS="$deterministic" speed 35 gpu_speed_deterministic --attention cudnn --precisions fp16 --slots 2048 --columns 2048
    step 45 "$python" benchmarks/gpu/main_job.py --steps 5 --precisions fp16 --name gpu_main_job_auto
    tests gpu_tests 400 -n 8 tests/models tests/sampling tests/training >/tmp/tests.out 2>&1 &
    XLA_FLAGS="$deterministic" XLA_PYTHON_CLIENT_MEM_FRACTION=.6 step 420 "$python" benchmarks/gpu/paper_test.py --warm-seconds 170 --seconds 100
    wait
    cat /tmp/tests.out
    ;;
*)
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
