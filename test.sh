#!/usr/bin/env bash
# Checks everything: format, lint, types, tests. Arguments narrow the tests: bash test.sh tests/data -k crop
# Always uses .venv, which it makes and keeps up to date.
set -euo pipefail
clone="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$clone/tools/environment.sh"
refresh_venv dev
cd "$clone"

# Tiny models on few cores: spinning OpenMP threads make a step up to 15 times slower. And no test may reach the network.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1

failed=()
check() {
    local name="$1"
    shift
    say "== $name"
    "$venv/bin/python" -m "$@" || failed+=("$name")
}
check format ruff format --check .
check lint ruff check .
check types mypy
check tests pytest -n 2 --dist worksteal "$@"

if [[ ${#failed[@]} -gt 0 ]]; then
    say "Failed: ${failed[*]}"
    exit 1
fi
say "All checks passed."
