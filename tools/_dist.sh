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
exec "$python" -m torch.distributed.run "${arguments[@]}" "$tools/$tool" "$@" --launcher pytorch
