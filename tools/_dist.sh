#!/usr/bin/env bash
# Start a tool under torchrun: _dist.sh TOOL PROCESSES [ARGUMENTS OF THE TOOL ...]
set -euo pipefail
tools=$(cd "$(dirname "$0")" && pwd)
tool=$1 processes=$2
shift 2
python=${PYTHON:-python}
[ -n "${PYTHON:-}" ] || [ ! -x "$tools/../.venv/bin/python" ] || python=$tools/../.venv/bin/python
arguments=(--nproc_per_node "$processes" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}")
if [ "${NNODES:-1}" -gt 1 ] || [ -n "${PORT:-}" ]; then
    arguments+=(--master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}")
else
    # On one machine any free port will do, so that two runs do not meet.
    arguments+=(--standalone)
fi
# torchrun ends with 1 whatever its processes end with, so the first of them leaves a note when
# SIGTERM made them save.
PREEMPTION_NOTE=$(mktemp -u "${TMPDIR:-/tmp}/preempted.XXXXXX")
export PREEMPTION_NOTE
# A shell lets what it starts in the background ignore Ctrl-C; this undoes that.
heed_interrupts='import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
"$python" -c "$heed_interrupts" -m torch.distributed.run "${arguments[@]}" \
    "$tools/$tool" "$@" --launcher pytorch &
torchrun=$!
trap 'kill -TERM "$torchrun" 2>/dev/null' TERM
# Ctrl-C reaches torchrun as well.
trap : INT
code=0
# A signal ends `wait` before torchrun has ended.
while wait "$torchrun" || code=$?; kill -0 "$torchrun" 2>/dev/null; do code=0; done
if [ -e "$PREEMPTION_NOTE" ]; then
    rm "$PREEMPTION_NOTE"
    code=75
fi
exit "$code"
