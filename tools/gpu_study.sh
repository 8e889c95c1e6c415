#!/usr/bin/env bash
# The study of docs/evidence.md on one GPU, on a machine without a network:
#
#   tools/gpu_study.sh inputs SOURCES GGUF    # before, where there is a network: fills $INPUTS
#   tools/gpu_study.sh BLOCK                  # ethics-1k, helpful-1k, ethics-4k, harmless-1k, flipped-20,
#                                             # flipped-40, ethics-13k, alpha or losses
#
# A call ends after $SECONDS_A_CALL; the same call resumes. Its small results are in $OUT at its end. SOURCES are the
# preference files of tools/study_data.py, GGUF the weights of tools/study_base.py, kept in two parts of 47 MiB for
# machines that take no larger file. PROCESSES runs share the GPU. TOY=1 runs one step of each on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
INPUTS=${INPUTS:-gpu-inputs} OUT=$(realpath -m "${OUT:-gpu-results}") PYTHON=${PYTHON:-python3}
SECONDS_A_CALL=${SECONDS_A_CALL:-570} PROCESSES=${PROCESSES:-6} SEEDS=${SEEDS:-5}

recipe=recipes/study-ethics-1k.yaml methods=bt,haf,dpo,normbt,bsr,grm-sft,dpo-logits rates=3e-4,1e-3,3e-3 options=()
case ${1:-} in
    inputs)
        mkdir -p "$INPUTS"
        PYTHONPATH=src $PYTHON tools/study_data.py "$2" "$INPUTS/data"
        split --number=2 "$3" "$INPUTS/smollm2.gguf-"
        $PYTHON -m pip download --quiet --no-deps -d "$INPUTS/wheels" gguf
        exit ;;
    ethics-1k) ;;
    helpful-1k | harmless-1k | ethics-4k) recipe=recipes/study-$1.yaml ;;
    ethics-13k) options=(data.cap=13440 training.steps=840) ;;
    flipped-*) options=("data.train=study/data/$1/ethics.jsonl") ;;
    alpha) methods=bt,haf:alpha=0.02,haf,haf:alpha=0.5,haf:alpha=1,haf:alpha=2 ;;
    losses) methods=bt$(printf ',haf:policy_loss=%s' ipo simpo kto orpo sft dpo-logits dpo-likelihood) ;;
    *) sed -n '2,10p' tools/gpu_study.sh; exit 2 ;;
esac
if [ -n "${TOY:-}" ]; then
    SEEDS=1 PROCESSES=1 rates=1e-3 options+=(training.steps=1 data.cap=16)
    options+=("data.validation=study/data/validation/ethics.jsonl#limit=8" "data.test=study/data/test/ethics.jsonl#limit=8")
fi

mkdir -p "$OUT" study
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ ! -d smollm2 ]; then
    site=$(mktemp -d)
    $PYTHON -m pip install --quiet --no-index --no-deps --target "$site" "$INPUTS"/wheels/gguf*.whl
    PYTHONPATH="$PYTHONPATH:$site" $PYTHON tools/study_base.py "$INPUTS"/smollm2.gguf-* smollm2.part
    mv smollm2.part smollm2
fi
[ -d study/data ] || { cp -r "$INPUTS/data" study/data.part && mv study/data.part study/data; }

code=0
timeout -s INT -k 20 "$SECONDS_A_CALL" $PYTHON -m hafrm compare "$recipe" training.precision=fp32 "${options[@]}" \
    --methods "$methods" --seeds "$SEEDS" --learning-rates "$rates" --processes "$PROCESSES" --out "study/gpu-$1" \
    2>&1 | tee -a "$OUT/log-$1.txt" || code=$?
cd study
find "gpu-$1" \( -name '*.json' -o -name '*.jsonl' -o -name recipe.yaml -o -name scores.safetensors \) \
    -not -path '*/checkpoints/*' -exec cp --parents {} "$OUT" \;
exit "$code"
