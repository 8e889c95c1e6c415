#!/usr/bin/env bash
# SGLang runs the forward pass; hafrm in front of it renders, authenticates and checks the scores.
#   examples/serve/sglang.sh RUN KEY_FILE
set -euo pipefail
run=$1 keys=$2
# no chunked prefill and no radix cache: a text gets the same number whatever else is asked
python -m sglang.launch_server --model-path "$run/model/reward" --is-embedding --host 127.0.0.1 \
  --port 8001 --chunked-prefill-size -1 --disable-radix-cache &
trap 'kill $!' EXIT
until curl --silent --fail http://127.0.0.1:8001/health >/dev/null; do sleep 1; done
hafrm verify http://127.0.0.1:8001 --golden "$run/model/reward"
hafrm serve "$run" --upstream http://127.0.0.1:8001 --host 0.0.0.0 --port 8000 --api-key-file "$keys"
