#!/usr/bin/env bash
# Trains: your config if there is one (config/config.json|toml|env, ./config.json, or arguments), else the bundled example.
# Uses the active Python environment if it imports this clone, else .venv, which it makes and keeps up to date.
set -euo pipefail
clone="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$clone/tools/environment.sh"

# An environment that the user made for this clone is left as it is; one that bears our stamp is kept up to date.
interpreter=""
for candidate in python "$venv/bin/python"; do
    if prefix="$(prefix_importing_clone "$candidate")" && ! [[ "$prefix" == "$venv" && -f "$(stamp_file core)" ]]; then
        interpreter="$prefix/bin/python"
        break
    fi
done
if [[ -z "$interpreter" ]]; then
    is_fresh dev || refresh_venv core
    interpreter="$venv/bin/python"
fi

if [[ $# -eq 0 ]]; then
    for config in config/config.json config/config.toml config/config.env config.json; do
        if [[ -f "$config" ]]; then
            say "Training $config."
            exec "$interpreter" -m simpletuner train
        fi
    done
    say "No config/config.json, .toml or .env and no ./config.json here: training the bundled example sana-emoji."
    set -- example=sana-emoji
fi
exec "$interpreter" -m simpletuner train "$@"
