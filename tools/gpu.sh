#!/usr/bin/env bash
# What a GPU has to show, in three calls of under ten minutes each, on a machine without a network:
#
#   tools/gpu.sh inputs DATA PHI_TOKENIZER MISTRAL_TOKENIZER   # before, where there is a network: fills $INPUTS
#   tools/gpu.sh 1    # imports, the tests marked cuda, two steps of every contender at toy size
#   tools/gpu.sh 2    # full fine-tuning of a Phi-2 shape: contenders, then the ladder of techniques
#   tools/gpu.sh 3    # LoRA of a Mistral-7B shape, scoring, idle time, chunks of the head, attention
#
# They take at most 490, 500 and 410 s, 24 minutes in all, and a GPU with 140 GB for the ladder of the second.
# Results go to $OUT (gpu-results): a line of JSON per row as it comes, and a log. A part that fails or runs
# out of time leaves the others alone. DEVICE=cpu runs everything at toy size, to see that it runs.
set -uo pipefail
cd "$(dirname "$0")/.."
INPUTS=${INPUTS:-gpu-inputs} OUT=${OUT:-gpu-results} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}

# What an image with torch 2.11, transformers, peft, accelerate, pyarrow and pytest for Python 3.12 lacks.
WHEELS="pydantic pydantic_core annotated-types typing-inspection ruamel.yaml datasets dill multiprocess
        typing_extensions beartype trl"

inputs() {  # 6 MB of wheels; the data and tokenizers are yours
    mkdir -p "$INPUTS/wheels"
    # shellcheck disable=SC2086
    $PYTHON -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -c constraints.txt -d "$INPUTS/wheels" $WHEELS
    cp "$1" "$INPUTS/data.jsonl.gz" && cp "$2" "$INPUTS/phi.json" && cp "$3" "$INPUTS/mistral.json"
}

part() {  # NAME SECONDS COMMAND...
    local name=$1 seconds=$(($2 * PATIENCE)) start=$SECONDS
    shift 2
    echo "== $name: $*"
    # pytest writes its XML on an interrupt
    timeout -s INT -k 20 "$seconds" "$@"
    echo "== $name: exit code $?, $((SECONDS - start)) s of $seconds"
}

train() {
    part "$1" "$2" $PYTHON benchmarks/train_step.py "${COMMON[@]}" --max-length $LENGTH \
        --seconds $((($2 - 60) * PATIENCE)) "${@:3}"
}
score() { part "$1" "$2" $PYTHON benchmarks/score.py "${COMMON[@]}" --seconds $((($2 - 30) * PATIENCE)) "${@:3}"; }
parts() { part "$1" "$2" $PYTHON benchmarks/gpu.py "${COMMON[@]}" --seconds $((($2 - 20) * PATIENCE)) "${@:3}"; }

smoke() {
    part versions 60 $PYTHON -c "
import importlib, importlib.metadata as m
for name in 'torch transformers peft accelerate datasets pydantic jaxtyping beartype trl pytest xdist vllm'.split():
    try:
        print(name, getattr(importlib.import_module(name), '__version__', 'there'))
    except Exception as error:
        print(name, 'is missing:', error)
import torch, hafrm.training.loop, hafrm.scoring.reward_model
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU', torch.version.cuda)"
    part tests 300 env HAFRM_CUDA_TESTS_ON="$DEVICE" $PYTHON -m pytest -n "$WORKERS" -m cuda \
        -o cache_dir=/tmp/pytest-cache -vv -rA --junitxml="$OUT/tests.xml" --durations=10 $TESTS
    train contenders 130 --shape tiny "${PHI[@]}" --steps $TOY_STEPS --ladder $TOY_STEPS
}

phi() {
    train phi-2-full 500 --shape "$PHI_SHAPE" "${PHI[@]}" --steps "$STEPS" --ladder $TOY_STEPS \
        --max-tokens 8192
}

rest() {
    local lora=(--shape "$MISTRAL_SHAPE" "${MISTRAL[@]}" --lora-rank 16)
    train mistral-lora 210 "${lora[@]}" --steps "$LORA_STEPS" --max-tokens 8192 --only hafrm TRL
    parts parts-phi-2 50 --shape "$PHI_SHAPE" "${PHI[@]}" --steps "$PART_STEPS"
    parts parts-mistral 50 "${lora[@]}" --steps "$PART_STEPS"
    score score-phi-2 100 --shape "$PHI_SHAPE" "${PHI[@]}" $SCORED
}

if [ "${1:-}" = inputs ]; then
    inputs "${@:2}"
    exit
fi
mkdir -p "$OUT"
if [ -d "$INPUTS/wheels" ] && [ "$DEVICE" = cuda ]; then
    SITE=$(mktemp -d)
    $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" "$INPUTS"/wheels/*.whl
fi
export PYTHONPATH="$PWD/src${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# As training sets it: steps of many lengths would fragment a GPU's memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export HF_DATASETS_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
PHI=(--tokenizer "$INPUTS/phi.json") MISTRAL=(--tokenizer "$INPUTS/mistral.json")
TESTS="tests/cuda tests/engine/test_logprobs.py"
if [ "$DEVICE" = cuda ]; then
    PATIENCE=1 LIMIT=1000 LENGTH=1024 PHI_SHAPE=phi-2 MISTRAL_SHAPE=mistral-7b
    STEPS=12 LORA_STEPS=8 TOY_STEPS=2 PART_STEPS=10
    SCORED="--singles 256 --repeats 2" WORKERS=4
else
    PATIENCE=10 LIMIT=40 LENGTH=64 PHI_SHAPE=tiny MISTRAL_SHAPE=tiny
    STEPS=1 LORA_STEPS=1 TOY_STEPS=1 PART_STEPS=3
    SCORED="--prompts 2 --singles 4 --repeats 1" WORKERS=0
fi
COMMON=(--data "$INPUTS/data.jsonl.gz#limit=$LIMIT" --device "$DEVICE" --out "$OUT")
case ${1:-} in
    1) smoke ;;
    2) phi ;;
    3) rest ;;
    *) sed -n '2,13p' "$0"; exit 2 ;;
esac 2>&1 | tee "$OUT/log-${1:-}.txt"
