#!/bin/bash
# One command of lwz_trainer over several nodes, without a scheduler: start it on each of them.
#
#   MASTER_ADDR=node0 NNODES=8 NODE_RANK=0 examples/launch/torchrun.sh train configs/qwen2.5_32b_64gpu.yaml
#
# MASTER_ADDR   host name of node 0, reachable from all
# NNODES        number of nodes
# NODE_RANK     of this node, 0 to NNODES - 1
# NPROC_PER_NODE, MASTER_PORT   8 and 29500 unless set
# PYTHON        the interpreter of the environment, python unless set
#
# output_dir and the model must be on storage that all nodes share.
set -euo pipefail
: "${MASTER_ADDR:?host name of node 0}" "${NNODES:?number of nodes}" "${NODE_RANK:?of this node}"

# No restarts: a rank that is lost ends the run, and the same command resumes it.
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="${NPROC_PER_NODE:-8}" \
    --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}" --max-restarts=0 \
    -m lwz_trainer "$@"
