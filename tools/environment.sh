# Sourced by train.sh and test.sh: finds or makes the Python environment. Needs `$clone`, the folder of this repository.
# A stamp in .venv, the checksum of what was asked for, says whether it is up to date.

venv="$clone/.venv"

say() { printf '%s\n' "$*" >&2; }

# Prints the prefix of the interpreter $1 if it imports this clone (asked from /, where no stray folder can answer).
prefix_importing_clone() {
    (cd / && "$1" - "$clone" 2>/dev/null) <<'EOS'
import pathlib, sys
import simpletuner
if pathlib.Path(simpletuner.__file__).resolve().parents[1] != pathlib.Path(sys.argv[1]).resolve():
    sys.exit(1)
print(sys.prefix)
EOS
}

# Prints the first Python between 3.10 and 3.13 that really runs.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
    say "No Python between 3.10 and 3.13 was found as python3 (or python3.10 ... python3.13)."
    say "Mend: install one, e.g. on Ubuntu: apt install python3.12 python3.12-venv"
    return 2
}

stamp_now() { { printf '%s\n' "$clone" && cat "$clone/pyproject.toml" "$clone/constraints.txt"; } | cksum; }
stamp_file() { printf '%s\n' "$venv/.simpletuner-$1"; }
is_fresh() { [[ -f "$(stamp_file "$1")" && "$(cat "$(stamp_file "$1")")" == "$(stamp_now)" ]]; }

# Makes .venv if it is missing or broken.
make_venv() {
    "$venv/bin/python" -c '' 2>/dev/null && return
    local python
    python="$(find_python)" || return
    say "Making .venv with $("$python" --version)."
    "$python" -m venv --clear "$venv"
}

# Brings .venv up to date with what $1 asks for: "core" or "dev" (which includes core).
refresh_venv() {
    is_fresh "$1" && return
    local wanted="$clone"
    [[ "$1" == core ]] || wanted="$clone[$1]"
    make_venv || return
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip
    say "Installing into .venv: the first time this brings PyTorch, up to several GB."
    rm -f "$(stamp_file dev)"
    echo unfinished >"$(stamp_file core)" # so that an install that was cut short is taken up again
    "$venv/bin/python" -m pip install --disable-pip-version-check -e "$wanted" -c "$clone/constraints.txt" >&2 || return
    stamp_now >"$(stamp_file core)"
    [[ "$1" == core ]] || stamp_now >"$(stamp_file "$1")"
}
