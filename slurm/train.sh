#!/usr/bin/env bash
# One training run on one node:
#
#     sbatch --partition=gpu --time=08:00:00 slurm/train.sh CONFIG RUN
#
# Options given to sbatch win over the lines below. Submit from an environment in which `spire-dist` works.
#SBATCH --job-name=spire
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
# No "B:" before TERM: the signal goes to the task, which saves and ends with 75, and not to this shell.
#SBATCH --signal=TERM@180
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: sbatch [options] slurm/train.sh CONFIG RUN" >&2
    exit 2
fi

status=0
srun --kill-on-bad-exit=1 spire-dist train "$1" --run "$2" || status=$?

# 75: saved and left early. Slurm does not queue a job again on an exit code by itself.
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
