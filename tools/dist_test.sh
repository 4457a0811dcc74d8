#!/usr/bin/env bash
# Test on several GPUs, or processes, of one or more machines.
#
#   tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENTS OF test.py ...]
#   tools/dist_test.sh seg_configs/fpn_effv2_s2.py work_dirs/fpn_effv2_s2/iter_40000.pth 8
#
# On several machines run it on each, with NNODES, NODE_RANK and MASTER_ADDR set:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 tools/dist_test.sh CONFIG CHECKPOINT 8
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
exec "$(dirname "$0")/_dist.sh" test.py "$3" "$1" "$2" "${@:4}"
