#!/usr/bin/env bash
# vLLM serves an exported reward directory; hafrm replays its golden scores on both routes.
#   examples/consumers/vllm_serve.sh REWARD_DIR [PORT]
# vLLM is in an environment of its own: VLLM=path/to/vllm (default: vllm on PATH).
set -euo pipefail
directory=$1
port=${2:-8000}
"${VLLM:-vllm}" serve "$directory" --runner pooling --host 127.0.0.1 --port "$port" &
server=$!
trap 'kill $server' EXIT
for _ in $(seq 300); do
  curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null && break
  kill -0 $server # ends the script if the server has died
  sleep 1
done
for path in classify pooling; do
  hafrm verify "http://127.0.0.1:$port/$path" --golden "$directory"
done
