#!/usr/bin/env bash
# Train on several GPUs, or processes, of one or more machines.
#
#   tools/dist_train.sh CONFIG PROCESSES [ARGUMENTS OF train.py ...]
#   tools/dist_train.sh seg_configs/fpn_effv2_s2.py 8 --auto-scale-lr
#
# On several machines run it on each, with NNODES, NODE_RANK and MASTER_ADDR set:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 tools/dist_train.sh CONFIG 8
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
exec "$(dirname "$0")/_dist.sh" train.py "$2" "$1" "${@:3}"
