#!/usr/bin/env bash
# Pins what the tests run with: installs the newest of pyproject.toml's ranges into a folder of its own and
# writes launch/constraints/pythonX.Y.txt, which launch/env.sh follows. Run the tests before it is committed.
#
#   PYTHON=/path/to/python launch/lock.sh       3.11 and 3.13 have a file
set -euo pipefail
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/env.sh"

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
    show_help
    exit 0
fi
work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
VENV="$work/venv" STAMPS="$work/venv/.launch"
make_venv
install_torch
run_pip install "$ROOT[test]"
version="$(version_of "$VENV/bin/python")"
file="$ROOT/launch/constraints/python$version.txt"
mkdir -p -- "$ROOT/launch/constraints"
# Names and versions alone: no address, no local version, and not this package.
"$VENV/bin/python" -m pip --disable-pip-version-check freeze |
    sed -n 's/^\([A-Za-z0-9._-]*==[0-9][^+ ;]*\).*/\1/p' >"$work/pins"
{
    printf '# What the tests run with on Python %s; launch/lock.sh writes it.\n' "$version"
    cat -- "$work/pins"
} >"$file.new"
mv -- "$file.new" "$file"
printf '%s\n' "$file"
