#!/usr/bin/env bash
# Test under SLURM.
#
#   [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS="..."] \
#       tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENTS OF test.py ...]
#   tools/slurm_test.sh gpu effv2 seg_configs/fpn_effv2_s2.py work_dirs/fpn_effv2_s2/iter_40000.pth
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
exec "$(dirname "$0")/_slurm.sh" test.py "$@"
