#!/usr/bin/env bash
# vLLM runs the forward pass on GPUs; hafrm in front of it renders, authenticates and checks the scores.
#   examples/serve/vllm.sh RUN KEY_FILE
set -euo pipefail
run=$1 keys=$2
# No chunked prefill: it cut inputs and then pooled the last token wrongly (vllm#48831, vllm#48901).
# Without it, --max-num-batched-tokens must exceed the longest input.
"${VLLM:-vllm}" serve "$run/model/reward" --runner pooling --host 127.0.0.1 --port 8001 \
  --no-enable-chunked-prefill &
trap 'kill $!' EXIT
until curl --silent --fail http://127.0.0.1:8001/health >/dev/null; do sleep 1; done
# checks lengths over 2,048 and 8,192 tokens, 32 at once, ids, messages, and names the setting for what fails
hafrm verify http://127.0.0.1:8001 --golden "$run/model/reward"
hafrm serve "$run" --upstream http://127.0.0.1:8001 --host 0.0.0.0 --port 8000 --api-key-file "$keys"
