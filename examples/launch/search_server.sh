#!/usr/bin/env bash
# One search server for all nodes, so that an index lies in memory once:
#
#   examples/launch/search_server.sh outputs/index 8765       # then --index http://THIS_NODE:8765
#
# It starts again if it stops, and a training waits for it: calls are tried again, and only repeated failures end a run.
set -euo pipefail

index=${1:?usage: search_server.sh INDEX [PORT]}
until igpo serve --index "$index" --host 0.0.0.0 --port "${2:-8765}"; do
    echo "The search server stopped with status $?. Starting it again in 5 s." >&2
    sleep 5
done
