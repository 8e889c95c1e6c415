#!/usr/bin/env bash
# Train in one process: on the GPU, or on the CPU if there is none.
#   examples/launch/one-gpu.sh [RECIPE [RUN_FOLDER [section.key=value ...]]]
# After it was stopped or killed, run it again: it resumes from its last checkpoint.
set -euo pipefail

recipe=${1:-recipes/phi2-full.yaml}
out=${2:-runs/$(basename "$recipe" .yaml)}

if [[ -f $out/recipe.yaml ]]; then
  exec python -m hafrm train --resume "$out"
fi
exec python -m hafrm train "$recipe" --out "$out" "${@:3}"
