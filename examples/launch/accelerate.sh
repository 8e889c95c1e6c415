#!/usr/bin/env bash
# Train under `accelerate launch`, if your machines are set up for it.
#   examples/launch/accelerate.sh [RECIPE [RUN_FOLDER [section.key=value ...]]]
# The number of GPUs is set in accelerate.yaml, next to this file.
set -euo pipefail

recipe=${1:-recipes/mistral-7b-lora.yaml}
out=${2:-runs/$(basename "$recipe" .yaml)}

# Its torchrun forwards SIGTERM and kills after 30 s, too soon for a large checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

launch=(accelerate launch --config_file "$(dirname "$0")/accelerate.yaml" -m hafrm train)
if [[ -f $out/recipe.yaml ]]; then
  exec "${launch[@]}" --resume "$out"
fi
exec "${launch[@]}" "$recipe" --out "$out" "${@:3}"
