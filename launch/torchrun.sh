#!/usr/bin/env bash
# Trains with NPROC workers on each of NNODES machines; arguments are those of pglpipe.train.
#
#   launch/torchrun.sh --stages 4 --steps 200
#   NPROC=1 NNODES=2 HEAD=node1:29500 launch/torchrun.sh --stages 4     # the same line on both machines
set -euo pipefail

NPROC="${NPROC:-2}"            # workers per machine
NNODES="${NNODES:-1}"          # machines
HEAD="${HEAD:-localhost:0}"    # host:port where the machines meet; port 0 takes a free one, for one machine
JOB="${JOB:-pglpipe}"          # runs that meet at the same HEAD need different names

if [[ "$NNODES" != 1 && "$HEAD" == localhost:* ]]; then
    echo "torchrun.sh: expected HEAD=host:port that $NNODES machines can reach, got $HEAD; set HEAD" >&2
    exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec torchrun --nproc-per-node="$NPROC" --nnodes="$NNODES" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="$JOB" -m pglpipe.train "$@"
