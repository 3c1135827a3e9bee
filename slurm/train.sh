#!/usr/bin/env bash
# One training run on the GPUs of any number of nodes, a task for each:
#
#     sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --partition=gpu slurm/train.sh CONFIG [RUN [options of train]]
#
# Options given to sbatch win over the lines below. Submit from an environment in which `spire-dist` works. `spire-dist submit`
# queues the same job, with what the configuration's [job] says.
#SBATCH --job-name=spire
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
# No "B:" before USR2: the signal goes to the tasks, which save together, and not to this shell.
#SBATCH --signal=USR2@180
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch [options] slurm/train.sh CONFIG [RUN [options of spire-dist train]]" >&2
    exit 2
fi
config=$1
run=${2:-run}
mkdir -p "$run/jobs"

# What becomes of the job when a rank has ended, cluster/entry.py sees to.
exec srun --kill-on-bad-exit=1 --unbuffered --open-mode=append --output="$run/jobs/%j_%t_log.out" \
    python -m cluster.entry "$config" "$run" "${@:3}"
