#!/usr/bin/env bash
# One run: enter the environment, and pass all arguments on to the training script.
here=$(cd "$(dirname "$0")" && pwd)
PATH=$here/env/bin:$PATH
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} # each run has its own CPUs, and no more
exec python3 "$here/../mlp.py" "$@"
