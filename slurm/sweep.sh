#!/usr/bin/env bash
# One sweep on all nodes of a job, by a Ray cluster of its own:
#
#     sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 --partition=gpu slurm/sweep.sh SPACE OUT
#
# Options given to sbatch win over the lines below. Submit from an environment in which `spire-dist` works.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=32G
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@180
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: sbatch [options] slurm/sweep.sh SPACE OUT" >&2
    exit 2
fi
export RAY_AUTH_TOKEN=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n') RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
export head=$(python -c "import ray; print(ray.util.get_node_ip_address())") port=$((30000 + SLURM_JOB_ID % 2500))

# Ray is deaf to the signals that make the sweep, and its trials, save and leave.
srun --overlap --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'trap "" USR2 TERM INT
    [ "$SLURM_PROCID" -eq 0 ] && role="--head --port=$port --include-dashboard=false" || role="--address=$head:$port"
    exec ray start --block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" $role' &
until (exec 3<>"/dev/tcp/$head/$port") 2>/dev/null; do sleep 1; kill -0 $!; done

status=0
srun --overlap --nodes=1 --ntasks=1 spire-dist sweep "$1" "$2" --ray-address "$head:$port" \
    $([ -e "$2/sweep.json" ] && echo --resume) || status=$?
# 75: saved and left early, to go on in the job's next life, unless it was cancelled.
[ "$status" -ne 75 ] || [ "$(squeue -ho %T -j "$SLURM_JOB_ID")" != RUNNING ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
