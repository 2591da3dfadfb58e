#!/usr/bin/env bash
# The one environment of this project: .venv beside pyproject.toml, made and filled when needed.
#
#   launch/env.sh [EXTRA ...]     makes it, with extras of pyproject.toml (test, gpu, tpu, hub, wandb),
#                                 and prints the path of its Python
#   . launch/env.sh               defines ROOT, VENV, make_environment and the functions below, and does nothing else
#
# PYTHON=/path/to/python chooses the interpreter of a new environment (3.11 to 3.13).
# With the extra test every version is the one in launch/constraints/pythonX.Y.txt, where there is such a file (lock.sh
# writes it); without it, and without such a file, the ranges of pyproject.toml hold.
set -euo pipefail

ROOT="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.." && pwd -P)"
VENV="$ROOT/.venv"
STAMPS="$VENV/.launch" # one file for each extra that is installed; also marks a folder that we may remove

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# Exit code 2: nothing was started, and the line says what is missing.
refuse() {
    say "$*"
    exit 2
}

# A script's help is the comment at its top.
show_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# Whether a script's first word is a command: a plain word that is no file. The program refuses what it does not know.
names_command() { [[ "$1" =~ ^[a-z]+$ && ! -f "$1" ]]; }

is_usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    # 3.11 first: for it the tests find a PyTorch without CUDA on more machines.
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if is_usable "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    refuse "no Python 3.11 to 3.13 with its venv module was found; install one, or name it: PYTHON=/path/to/python"
}

# What an installed extra depends on. The folder is in it because an editable install points there.
stamp() { # EXTRA
    "$VENV/bin/python" --version
    printf '%s\n' "$ROOT"
    cat "$ROOT/pyproject.toml"
    local pins
    pins="$(constraints "$1")"
    [[ -z "$pins" ]] || cat "$pins"
}

has_extra() { [[ -f "$STAMPS/$1" ]] && [[ "$(stamp "$1" 2>/dev/null)" == "$(cat "$STAMPS/$1")" ]]; }

# The file of exact versions for these extras on this Python, or nothing.
constraints() { # [EXTRA ...]
    local pins
    pins="$ROOT/launch/constraints/python$(version_of "$VENV/bin/python").txt"
    if [[ " $* " == *" test "* && -f "$pins" ]]; then printf '%s\n' "$pins"; fi
}

run_pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; } # errors only

version_of() { "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")'; }

# Whether .venv is of the version that the caller asks for, if of any.
is_wanted() { [[ -z "${PYTHON:-}" || "$(version_of "$VENV/bin/python")" == "$(version_of "$PYTHON")" ]]; }

make_venv() {
    if is_usable "$VENV/bin/python" && is_wanted && run_pip --version >/dev/null 2>&1; then return; fi
    local python
    python="$(find_python)"
    if [[ -e "$VENV" ]]; then
        [[ -d "$STAMPS" ]] || refuse "$VENV does not fit and was not made by these scripts; move it away"
        say "making .venv anew"
        rm -rf -- "$VENV"
    fi
    mkdir -p -- "$STAMPS" # before anything else: half an environment is then known to be ours
    "$python" -m venv "$VENV"
}

# PyTorch serves the parity tests alone, and is taken only where it comes without CUDA's gigabytes.
install_torch() { # [FILE OF EXACT VERSIONS]
    local wanted=torch==2.13.0 plan="$STAMPS/torch.plan" pins="${1:-}"
    if [[ "$(version_of "$VENV/bin/python")" != 3.11 ]]; then
        say "no PyTorch on this Python version (3.11 has one); the parity tests will be skipped"
    elif ! run_pip install --dry-run --report "$plan" "$wanted" >/dev/null 2>&1; then
        say "$wanted is not to be had here; the parity tests will be skipped"
    elif grep -Eq '"name": "(nvidia|cuda)-' "$plan"; then
        say "$wanted would bring CUDA here; the parity tests will be skipped"
    else
        run_pip install ${pins:+--constraint "$pins"} "$wanted"
    fi
    rm -f -- "$plan"
}

# install [EXTRA ...]: the package with these extras.
install() {
    local extra began=$SECONDS extras pins
    pins="$(constraints "$@")"
    extras="$(IFS=,; printf '%s' "$*")"
    say "installing jaxrl_fp16${extras:+[$extras]} into $VENV; this takes some minutes, once"
    [[ ",$extras," != *,test,* ]] || install_torch "$pins" # before the rest, which does not ask for this version
    run_pip install ${pins:+--constraint "$pins"} --editable "$ROOT${extras:+[$extras]}"
    for extra in base "$@"; do # last, and whole: an install that was interrupted is begun again
        stamp "$extra" >"$STAMPS/$extra.new"
        mv -- "$STAMPS/$extra.new" "$STAMPS/$extra"
    done
    say "installed in $((SECONDS - began)) s"
}

has_all() {
    local extra
    for extra in "$@"; do has_extra "$extra" || return 1; done
    is_wanted
}

# make_environment [EXTRA ...]: returns at once when everything is there.
make_environment() {
    if [[ -n "${PYTHON:-}" ]] && ! is_usable "$PYTHON"; then
        refuse "PYTHON=$PYTHON does not run or is no Python 3.11 to 3.13 with its venv module"
    fi
    if has_all base "$@"; then return; fi
    # A second start waits here for the first, and then finds its work done. The lock is on this very
    # file, which is always there, and is gone with the process that holds it.
    exec 9<"$ROOT/launch/env.sh"
    if command -v flock >/dev/null; then flock 9; fi
    if ! has_all base "$@"; then
        make_venv
        install "$@"
    fi
    exec 9<&-
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
        show_help
        exit 0
    fi
    make_environment "$@"
    printf '%s\n' "$VENV/bin/python"
fi
