#!/usr/bin/env bash
# Every table that a GPU is needed for, in one call of at most 8 minutes.
#
#   benchmarks/gpu.sh FOLDER [operator] [training] [decoding] [scaling]     (all, if none is named)
#   benchmarks/gpu.sh FOLDER tests     the tests that need a GPU; at most 8 minutes more, less with pytest-xdist
#   benchmarks/gpu.sh FOLDER lra       how long the recipes of the Long Range Arena take; 5 minutes more
#   benchmarks/gpu.sh FOLDER ladder    does the lead last: models of 1.2 to 20 M parameters, 3 to 30 M tokens of BPE, each
#                                      arm its rate; 9 minutes a call, and the next call goes on. DATA names the texts
#                                      (imdb, which is downloaded), SEEDS their number (1)
#
# FOLDER gets results.md, a JSON file for each table, and log.txt. Each part has its own time limit, and what it had
# finished by then is kept. PYTHON names the interpreter (python3); nothing needs to be installed but torch, Triton,
# transformers and pytest, with hypothesis; for the ladder, the package.
set -uo pipefail
data=${DATA:-imdb}
[ -e "$data" ] && data=$(realpath "$data") # a named set is no path
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(operator training decoding scaling)
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
failed=0

part() { # seconds, command...
    local limit=$1
    shift
    echo "== $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" # as Ctrl-C: tables are printed as far as they are
    local status=$?
    if [ $status -ne 0 ]; then
        echo "== ended with status $status (124: out of time)"
        failed=1
    fi
}

{
    for name in "${parts[@]}"; do
        case $name in
            tests)
                spread=()
                "$python" -c "import xdist" 2>/dev/null && spread=(-n 8 --dist worksteal)
                part 470 "$python" -m pytest tests/ops tests/model -m gpu \
                    "${spread[@]}" -p no:cacheprovider --timeout=180 --tb=short -rfE --durations=5 ;;
            operator) part 170 "$python" benchmarks/operator_gpu.py --seconds 50 --out "$out" ;;
            training) part 170 "$python" benchmarks/training.py --device cuda --preset gpt2 --bf16 --compile \
                --batch-size 16 --mixings fixed learnable --seconds 100 --out "$out" ;;
            decoding) part 80 "$python" benchmarks/decoding.py --device cuda --preset gpt2 --seconds 20 --out "$out" ;;
            scaling) part 50 "$python" benchmarks/scaling.py --device cuda --seconds 20 --out "$out" ;;
            lra) part 300 "$python" benchmarks/lra.py --device cuda --seconds 5 --out "$out" ;;
            ladder) part 540 "$python" -m waveletgpt ladder "$data" --recipe ladder-gpu --arms none fixed haar-inputs \
                --sizes 1.2M 5M 20M --tokens 3M 10M 30M --sweep lr=2e-3,4e-3,8e-3 --seeds "${SEEDS:-1}" \
                --out "$out/ladder" --resume ;;
            *) echo "no part is called $name"; failed=1 ;;
        esac
    done
    "$python" benchmarks/measuring.py "$out" || failed=1
    exit $failed
} 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
