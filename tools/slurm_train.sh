#!/usr/bin/env bash
# Train under SLURM.
#
#   [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS="..."] \
#       tools/slurm_train.sh PARTITION JOB_NAME CONFIG [ARGUMENTS OF train.py ...]
#   GPUS=16 tools/slurm_train.sh gpu effv2 det_configs/mask_rcnn_effv2_s2.py --auto-scale-lr
#
# Before it is preempted or its time is over, the training is saved, and ends with exit code 75. Inside
# a batch job it goes back into the queue, and on from there when it is its turn again:
#   sbatch --partition gpu --nodes 1 --ntasks-per-node 8 --gres gpu:8 --requeue --open-mode append \
#       --signal TERM@120 --wrap 'tools/slurm_train.sh gpu effv2 CONFIG'
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
exec "$(dirname "$0")/_slurm.sh" train.py "$@"
