#!/usr/bin/env bash
# Start a tool under srun: _slurm.sh TOOL PARTITION JOB_NAME [ARGUMENTS OF THE TOOL ...]
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
tool=$1 partition=$2 job_name=$3
shift 3
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x "$tools/../.venv/bin/python" ] || python=$tools/../.venv/bin/python
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS holds several arguments
exec srun --partition "$partition" --job-name "$job_name" \
    --ntasks "$gpus" --ntasks-per-node "$gpus_per_node" --gres "gpu:$gpus_per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "$python" -u "$tools/$tool" "$@" --launcher slurm
