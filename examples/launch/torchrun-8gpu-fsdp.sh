#!/usr/bin/env bash
# Train on the GPUs of one machine, with weights and optimiser state sharded over them (FSDP2).
#   GPUS=8 examples/launch/torchrun-8gpu-fsdp.sh [RECIPE [RUN_FOLDER [section.key=value ...]]]
# batch_size counts comparisons over all processes, so the result does not depend on GPUS.
set -euo pipefail

recipe=${1:-recipes/phi2-full.yaml}
out=${2:-runs/$(basename "$recipe" .yaml)}

# torchrun forwards SIGTERM and kills after 30 s, too soon for a checkpoint of many gigabytes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

launch=(torchrun --standalone --nproc-per-node "${GPUS:-8}" -m hafrm train)
if [[ -f $out/recipe.yaml ]]; then
  exec "${launch[@]}" --resume "$out"
fi
exec "${launch[@]}" "$recipe" --out "$out" training.parallel=fsdp "${@:3}"
