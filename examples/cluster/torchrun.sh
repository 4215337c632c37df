#!/usr/bin/env bash
# One run on several machines. Give the same command on each of them; the machines find out by themselves who is first.
#
#   HEAD=10.0.0.1 NODES=2 examples/cluster/torchrun.sh configs/t2i_training.yaml [key.path=value ...]
#
# HEAD      name or address of one of the machines, which the others can reach
# NODES     how many machines there are (1)
# WORKERS   processes on each: a number, or gpu for one per GPU (gpu)
# RESTARTS  how often the processes are started again after one of them has died (3)
# PORT      a free port of HEAD (29500)
# RUN_ID    a name of this run, the same on all machines and that of no other run (HEAD:PORT)
#
# Without HEAD it is one machine. output_dir must lie on a disk that all machines share.
set -euo pipefail
: "${1:?usage: HEAD=... NODES=... examples/cluster/torchrun.sh CONFIG.yaml [key.path=value ...]}"
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PORT="${PORT:-29500}"
# Seconds that the processes may take to save when the job is stopped; an older torchrun always gives them 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"

exec torchrun \
  --nnodes "${NODES:-1}" --nproc-per-node "${WORKERS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${RUN_ID:-${HEAD:-$(hostname)}:$PORT}" --rdzv-endpoint "${HEAD:-localhost}:$PORT" \
  train.py --resume auto --config "$@"
