#!/usr/bin/env bash
# Build sdist and wheel, check what is in them, and use the wheel as a stranger does: in fresh environments, outside
# the clone, with the newest and with the oldest versions that pyproject.toml allows.
#
#   tools/wheel_test.sh                 # newest, then oldest; ends with one line for both
#   tools/wheel_test.sh oldest tests/data tests/engine    # one of them, and these tests of the sdist against the wheel
#
# PYTHON is the interpreter; DIST keeps what was built; TORCH (torch==2.13.0) replaces torch's version in both: PyPI's
# torch for Linux is a CUDA build of gigabytes, and one CPU build may be at hand. PIP_EXTRA_INDEX_URL works as ever.
set -euo pipefail
cd "$(dirname "$0")/.."
clone=$PWD python=${PYTHON:-python3} work=$(mktemp -d)
dist=$(realpath -m "${DIST:-$work/dist}")
[ -z "$(ls -A "$dist" 2>/dev/null)" ] || { echo "$dist is not empty" >&2; exit 1; }
[[ ${1:-oldest} =~ ^(oldest|newest)$ ]] || { echo "newest or oldest, not $1" >&2; exit 2; }
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONPATH

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build twine
"$work/build/bin/python" -m build --outdir "$dist" . >"$work/build.log"  # the wheel from the sdist
"$work/build/bin/twine" check --strict "$dist"/*
tar xzf "$dist"/*.tar.gz -C "$work"
sdist=$(echo "$work"/hafrm-*)
"$work/build/bin/python" "$clone/tools/wheel_contents.py" "$dist"/*.whl "$sdist" >"$work/oldest.txt"

smoke() {  # NAME TESTS...: an environment, the commands, Python and its types
    local bin=$work/$1/bin constraints=$work/$1.txt
    touch "$constraints"
    [ -z "${TORCH:-}" ] || { sed -i '/^torch==/d' "$constraints"; echo "$TORCH" >>"$constraints"; }
    "$python" -m venv "$work/$1"
    "$bin/pip" install --quiet -c "$constraints" "${TORCH:-torch}"
    "$bin/pip" install --quiet -c "$constraints" "$(echo "$dist"/*.whl)[report,serve]"
    "$bin/pip" freeze | tr '\n' ' '
    echo
    mkdir "$work/use-$1" && cd "$work/use-$1"
    PYTHONPATH=$sdist/tests "$bin/python" -c "
from pathlib import Path
from support.tiny_runs import write_base, write_preferences
write_base(Path()), write_preferences(Path('train.jsonl')), write_preferences(Path('test.jsonl'), 20, 40)"
    "$bin/hafrm" --version
    "$bin/hafrm" data train.jsonl
    "$bin/hafrm" train "$sdist/recipes/tiny-cpu.yaml" model.path=base data.train=train.jsonl data.max_length=64 \
        training.steps=2 training.batch_size=4 evaluation.every=1 data.validation_fraction=0.2 --out run
    "$bin/hafrm" evaluate run test.jsonl
    "$bin/hafrm" score run test.jsonl --out scored
    "$bin/hafrm" verify run/model/reward
    "$bin/hafrm" report run
    cp "$sdist/tools/user_code.py" . && "$bin/python" user_code.py
    if [ "$1" = newest ]; then
        "$bin/pip" install --quiet mypy pyright
        "$bin/mypy" --strict user_code.py
        "$bin/pyright" --pythonpath "$bin/python" user_code.py
    fi
    if [ $# -gt 1 ]; then
        "$bin/pip" install --quiet -c "$constraints" -r "$sdist/requirements-dev.txt"
        cd "$sdist" && "$bin/python" -m pytest -q -x -m "not slow" "${@:2}"
    fi
    cd "$clone"
}

if [ $# -gt 0 ]; then
    smoke "$@"
else
    smoke newest
    smoke oldest
fi
echo "wheel_test: passed"
