#!/usr/bin/env bash
# One store, made by an array of jobs of one core, with the bytes of one machine:
#
#     sbatch --array=0-15 --partition=cpu slurm/prep.sh SOURCE STORE [options of spire-dist prep]
#
# Each job makes its share of the shards, and the one that ends last completes the store. A job that Slurm stops is queued
# again and goes on; after any failure the same command makes what is missing. SOURCE, its stacks and STORE must lie where all
# nodes see them. Options given to sbatch win over the lines below; submit from an environment in which `spire-dist` works.
#SBATCH --job-name=prep
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=4G
#SBATCH --time=04:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --requeue
#SBATCH --open-mode=append
# No "B:" before USR2: the signal goes to the task, and not to this shell.
#SBATCH --signal=USR2@180
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: sbatch --array=0-15 [options] slurm/prep.sh SOURCE STORE [options of spire-dist prep]" >&2
    exit 2
fi
share=$((${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}))/${SLURM_ARRAY_TASK_COUNT:-1}
exec srun --kill-on-bad-exit=1 spire-dist prep "$@" --share="$share"
