#!/usr/bin/env bash
# Make the environment for the training script in env/, from requirements.txt: with conda where the cluster
# has it as a module, else with venv. Run it again after a change of requirements.txt.
set -euo pipefail
cd "$(dirname "$0")"

load_conda() {
    type module >/dev/null 2>&1 || return 1
    for name in conda miniconda3 anaconda3 miniforge3; do
        module load "$name" >/dev/null 2>&1 && type conda >/dev/null 2>&1 && return
    done
    return 1
}

if [ ! -d env ]; then
    if load_conda; then
        conda create --yes --quiet --prefix "$PWD/env" python pip
    else
        python3 -m venv env
    fi
fi
env/bin/python3 -m pip install --quiet --disable-pip-version-check -r requirements.txt
touch env/ready # bench-mlp.sh runs this script until it has come to its end once
