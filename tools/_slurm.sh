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
run=(srun --partition "$partition" --job-name "$job_name"
    --ntasks "$gpus" --ntasks-per-node "$gpus_per_node" --gres "gpu:$gpus_per_node"
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-}
    "$python" -u "$tools/$tool" "$@" --launcher slurm)
[ "$tool" = train.py ] || exec "${run[@]}"

# Two minutes before the time is over, or when another job is to take its place, SLURM sends SIGTERM
# and train.py saves. What srun then ends with depends on which process ended first, so the first of
# them leaves a note: in this folder, because it may run on another machine.
PREEMPTION_NOTE=$(mktemp -u "$PWD/.preempted.XXXXXX")
export PREEMPTION_NOTE
run=(srun --signal=TERM@120 "${run[@]:1}")
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || run+=(--resume)
# The shell is sent SIGTERM as well, and has to outlive srun.
trap : TERM
code=0
"${run[@]}" || code=$?
[ -e "$PREEMPTION_NOTE" ] || exit "$code"
rm "$PREEMPTION_NOTE"
# Not a job that its user has cancelled, nor one that SLURM requeues by itself.
state=$([ -z "${SLURM_JOB_ID:-}" ] || scontrol show job "$SLURM_JOB_ID")
if [[ $state == *JobState=RUNNING* ]] && scontrol requeue "$SLURM_JOB_ID"; then
    echo "saved; job $SLURM_JOB_ID goes back into the queue" >&2
fi
exit 75
