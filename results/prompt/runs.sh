#!/usr/bin/env bash
# Every run behind the tables of docs/PROMPTS.md, in the order of what is looked at first. A run that is there is left,
# one that was stopped goes on.
#     results/prompt/runs.sh [RUNS] [PART] [SEEDS]
# RUNS: where the runs' folders go (default: runs/prompt); PART: toy, camvid or bits (default: all three, one after the
# other); SEEDS: "0 1". Set CAMVID to a folder in SegNet's layout, and B0 to a B0 trained on it for the last part.
# Short schedules on one thread, to compare and not to boast of: toy scenes at 64x128, 200 steps of 4 images (the
# teacher 300); CamVid at 144x192, 200 steps of 4 (the teacher 300).
cd "$(dirname "$0")/../.." || exit 1
RUNS=${1:-runs/prompt}
PARTS=${2:-toy camvid bits}
SEEDS=${3:-0 1}
CAMVID=${CAMVID:-camvid}
B0=${B0:-/nowhere}
mkdir -p "$RUNS"
export OMP_NUM_THREADS=1

TOY=(--data toy --size 64 128 --crop 64 128 --workers 0 --eval-every 100)
STREET=(--data "camvid:$CAMVID" --size 144 192 --crop 144 192 --batch-size 4 --workers 0 --eval-every 1000)

prompt() {                                    # prompt NAME FLAGS...: a network that is told what to segment
    local name=$1
    shift
    [ -e "$RUNS/$name/done" ] && return
    echo "$(date +%H:%M:%S) $name"
    local flags=("$@")
    [ -e "$RUNS/$name/last.pth" ] && flags=(--resume)       # begun before: it goes on
    python -m extras.prompt train "${flags[@]}" --out "$RUNS/$name" >> "$RUNS/$name.txt" 2>&1 && touch "$RUNS/$name/done"
}

closed() {                                    # closed NAME FLAGS...: the ordinary B0 of as many steps
    local name=$1
    shift
    [ -e "results/prompt/$name.json" ] && return
    echo "$(date +%H:%M:%S) $name"
    python train.py "$@" --out "$RUNS/$name" > "$RUNS/$name.txt" 2>&1
    python eval.py "$RUNS/$name/last.pth" --data "$2" --json "results/prompt/$name.json" > /dev/null 2>&1
}

score() {                                     # score NAME TEACHER FLAGS...: its metrics on val, beside the teacher's
    local name=$1
    local teacher=$2
    shift 2
    [ -e "results/prompt/$name.json" ] && return
    [ -e "$RUNS/$name/done" ] || return                     # of a whole run only
    python -m extras.prompt compare "$RUNS/$name/last.pth" --teacher "$RUNS/$teacher/last.pth" --modes fp32 \
        --json "results/prompt/$name.json" "$@" > "$RUNS/$name-scores.txt" 2>&1
}

on_test() {                                   # on_test NAME: CamVid's test, which has absent classes
    [ -e "results/prompt/camvid-test-$1.json" ] && return
    [ -e "$RUNS/camvid-$1/done" ] || return
    python -m extras.prompt compare "$RUNS/camvid-$1/last.pth" --data "camvid:$CAMVID" --split test --modes fp32 \
        --json "results/prompt/camvid-test-$1.json" > "$RUNS/camvid-test-$1.txt" 2>&1
}

toy_student() {                               # toy_student NAME FLAGS...
    local name=$1
    shift
    prompt "$name" "${TOY[@]}" --iters 200 --lr 2.4e-3 "$@"
    score "$name" teacher
}

fewer_bits() {                                # fewer_bits NAME: the whole table of one checkpoint
    [ -e "results/prompt/bits-$1.json" ] && return
    [ -e "$RUNS/$1/done" ] || return
    python -m extras.prompt compare "$RUNS/$1/last.pth" --modes fp32 fp16 int8 int4 int8+int4 \
        --json "results/prompt/bits-$1.json" > "$RUNS/bits-$1.txt" 2>&1
}

negatives() {                                 # negatives SEED
    toy_student no-absent-$1 --seed $1 --absent 0
    toy_student no-empty-$1 --seed $1 --empty 0
    toy_student many-empty-$1 --seed $1 --empty 0.2
}

toy() {
    prompt teacher "${TOY[@]}" --student b2 --tokenizer bytes --lr 1.2e-3 --iters 300
    local seed
    for seed in $SEEDS; do
        local taught=(--seed "$seed" --teacher "$RUNS/teacher/last.pth")
        local half=("${TOY[@]}" --iters 100 --lr 2.4e-3 "${taught[@]}")
        toy_student supervised-$seed --seed $seed
        toy_student phase-2-$seed "${taught[@]}"
        prompt phase-1-half-$seed "${half[@]}" --phase 1
        prompt phase-1-2-$seed "${half[@]}" --phase 2 --init "$RUNS/phase-1-half-$seed/last.pth"
        score phase-1-2-$seed teacher
        closed closed-set-$seed "${TOY[@]}" --iters 200 --lr 4.8e-3 --seed $seed
        [ "$seed" = 0 ] && negatives 0
    done
    [[ " $SEEDS " == *" 1 "* ]] && negatives 1
    for seed in $SEEDS; do
        toy_student four-prompts-$seed --seed $seed --prompts 4
        # 100 steps after the tokenizer changed: the text encoder new and the rest kept, or all of it new
        toy_student swap-init-$seed --seed $seed --iters 100 --tokenizer bytes \
            --init "$RUNS/supervised-$seed/last.pth" --reset-text
        toy_student swap-scratch-$seed --seed $seed --iters 100 --tokenizer bytes
    done
    # Longer and at another rate: what a packed prompt student is measured on.
    prompt first-400-0 "${TOY[@]}" --iters 400 --lr 1.2e-3
    fewer_bits first-400-0
    fewer_bits teacher
}

camvid() {
    prompt camvid-teacher "${STREET[@]}" --student b2 --tokenizer bytes --lr 1.2e-3 --iters 300
    local seed
    for seed in $SEEDS; do
        local student=("${STREET[@]}" --lr 2.4e-3 --seed "$seed")
        local taught=("${student[@]}" --teacher "$RUNS/camvid-teacher/last.pth")
        prompt camvid-supervised-$seed "${student[@]}" --iters 200
        prompt camvid-phase-2-$seed "${taught[@]}" --iters 200
        prompt camvid-phase-1-half-$seed "${taught[@]}" --iters 100 --phase 1
        prompt camvid-phase-1-2-$seed "${taught[@]}" --iters 100 --phase 2 \
            --init "$RUNS/camvid-phase-1-half-$seed/last.pth"
        closed camvid-closed-set-$seed "${student[@]}" --iters 200
        local name
        for name in supervised phase-2 phase-1-2; do
            score camvid-$name-$seed camvid-teacher --data "camvid:$CAMVID"
        done
    done
    for seed in $SEEDS; do
        for name in supervised phase-2 phase-1-2; do
            on_test $name-$seed
        done
    done
}

quantize() {                                  # quantize BITS FLAGS...: the CamVid B0
    local bits=$1
    shift
    [ -e "results/prompt/camvid-b0-$bits.json" ] && return
    python -m extras.quantize "$B0" --bits "$bits" --out "$RUNS/camvid-b0-$bits.pth" --data "camvid:$CAMVID" \
        --json "results/prompt/camvid-b0-$bits.json" "$@" > "results/prompt/camvid-b0-$bits.txt" 2>&1
}

bits() {
    [ -e "$B0" ] || return
    quantize 8
    python -m extras.export "$B0" "$RUNS/camvid-b0-fp16.pth" --half > /dev/null
    python eval.py "$RUNS/camvid-b0-fp16.pth" --data "camvid:$CAMVID" --json results/prompt/camvid-b0-fp16.json > /dev/null
    quantize 4 --layers
    quantize 4+8
}

for part in $PARTS; do
    $part
done
