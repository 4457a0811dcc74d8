#!/usr/bin/env bash
# Inference on several machines under SLURM: Ray starts on each, and ends with the command.
#
#   [NODES=2 GPUS_PER_NODE=8 CPUS_PER_NODE=64 RAY_PORT=6379 SRUN_ARGS="..."] \
#       tools/slurm_batch_infer.sh PARTITION JOB_NAME CONFIG CHECKPOINT SOURCE --out DESTINATION \
#       [ARGUMENTS OF batch_infer.py ...]
#   NODES=4 tools/slurm_batch_infer.sh gpu effv2 seg_configs/fpn_effv2_s2.py fpn_s2.pth \
#       /shared/images --out /shared/results
set -euo pipefail
[ $# -ge 5 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
tools=$(cd "$(dirname "$0")" && pwd)
partition=$1 job_name=$2
shift 2
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x "$tools/../.venv/bin/python" ] || python=$tools/../.venv/bin/python
nodes=${NODES:-2} gpus=${GPUS_PER_NODE:-8} port=${RAY_PORT:-6379}
resources=()
[ "$gpus" -eq 0 ] || resources=(--gres "gpu:$gpus")
# On each machine; the first of them is the head, where the command runs.
# shellcheck disable=SC2016  # expanded on the machines
on_each='head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
nodes=$1 port=$2
shift 2
exec "$1" -m ray.scripts.scripts symmetric-run --address "$head:$port" --min-nodes "$nodes" -- \
    "$@" --address "$head:$port"'
# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
exec srun --partition "$partition" --job-name "$job_name" --nodes "$nodes" --ntasks-per-node 1 \
    "${resources[@]}" --cpus-per-task "${CPUS_PER_NODE:-64}" ${SRUN_ARGS:-} \
    bash -c "$on_each" bash "$nodes" "$port" "$python" -u "$tools/batch_infer.py" "$@"
