#!/usr/bin/env bash
# Check every GPU path of this machine against the CPU, then how fast it is: no network, 8 minutes.
#
#   bash launch/gpu_acceptance.sh [OUT.json]
#
# Prints a table and writes JSON (gpu_acceptance.json). Exits with 0 if every check passes, 1 if one
# fails, 4 without a GPU. DEVICE=cpu runs the same checks on the CPU, to try them out.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$launch/environment.sh"
out=$(realpath -m "${1:-gpu_acceptance.json}")
cd "$launch/.."
# Each check has its own limit; this one is for a driver that hangs.
exec timeout --kill-after=30 900 \
    python -m dist_train.acceptance.acceptance --device "${DEVICE:-cuda}" --out "$out"
