#!/usr/bin/env bash
# The sweep as one Slurm job: `sbatch ./bench-mlp.sh` runs what results.db lacks, and typing it again goes on.
#SBATCH --job-name=bench-mlp
#SBATCH --ntasks=24
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --no-kill
#SBATCH --output=slurm-%j.log
# Each task is one run at a time, on whatever nodes Slurm finds. Two minutes before the time limit, Slurm sends
# SIGUSR1 to this script (B:), which stops the sweep and submits itself again. A node that fails takes its runs
# with it, not the job (--no-kill).

set -u
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")}" || exit
[ -e job.sh ] || { echo "bench-mlp: submit it from its own folder" >&2; exit 1; }
sweep=
time_is_up=
trap 'time_is_up=yes; [ -z "$sweep" ] || kill -USR1 "$sweep"' USR1
trap '[ -z "$sweep" ] || kill -TERM "$sweep"' TERM INT
if [ ! -e env/ready ]; then
    ./setup.sh || exit
    [ -z "$time_is_up" ] || exec sbatch ./bench-mlp.sh # that took all the time; the next job finds it done
fi

stored() {
    python3 ../../dbtool.py query results.db "SELECT count(*) FROM results" --no-header 2>/dev/null || echo 0
}

before=$(stored)
python3 ../../sweep.py results.db \
    -p layers=5,10 -p activation=tanh,relu -p epochs=1,2 \
    -p training_window_length=60..100..20 -p sample_window_length=5,10 \
    --where "sample_window_length < training_window_length" \
    --samples 2 --jobs "$SLURM_NTASKS" --retries 2 --grace 90 \
    -- srun -Q -N1 -n1 -c"${SLURM_CPUS_PER_TASK:-1}" --exact ./job.sh \
    --author "${USER:-$(id -un)}" --seed "{sample}" &
sweep=$!

while kill -0 $sweep 2>/dev/null; do wait $sweep; done # a signal ends a wait early
wait $sweep
status=$?

# 75: work is left. Without a single new row, the next job would get no further either.
if [ -n "$time_is_up" ] && [ $status = 75 ]; then
    if [ "$(stored)" -gt "$before" ]; then
        exec sbatch ./bench-mlp.sh
    fi
    echo "bench-mlp: no run ended within the time limit; raise --time" >&2
fi
exit $status
