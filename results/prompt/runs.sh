#!/usr/bin/env bash
# Every run behind the tables of docs/PROMPTS.md, in the order of what is looked at first. A run that is there is left,
# one that was stopped goes on.
#     results/prompt/runs.sh [RUNS]        RUNS: where the runs' folders go (default: runs/prompt)
# Toy scenes at 64x128, 200 steps of 4 images (the teacher 300), one thread: short schedules, to compare and not to
# boast of.
cd "$(dirname "$0")/../.." || exit 1
RUNS=${1:-runs/prompt}
STEPS=200
HALF=100
CAMVID=${CAMVID:-../../shared/camvid}           # SegNet's layout
B0=${B0:-/nowhere}                             # a B0 trained on CamVid, for the last part
mkdir -p "$RUNS"
export OMP_NUM_THREADS=1

run() {                                       # run NAME FLAGS...: a prompt student, then its scores
    local name=$1
    shift
    [ -e "$RUNS/$name/done" ] && return
    echo "$(date +%H:%M:%S) $name"
    local flags=(--data toy --size 64 128 --crop 64 128 --workers 0 --eval-every 100 --iters $STEPS --lr 2.4e-3 "$@")
    [ -e "$RUNS/$name/last.pth" ] && flags=(--resume)       # begun before: it goes on
    python -m extras.prompt train "${flags[@]}" --out "$RUNS/$name" >> "$RUNS/$name.txt" 2>&1 && touch "$RUNS/$name/done"
}

score() {                                     # score NAME: its metrics on val, beside the teacher's
    [ -e "results/prompt/$1.json" ] && return
    python -m extras.prompt compare "$RUNS/$1/last.pth" --teacher "$RUNS/teacher/last.pth" --modes fp32 \
        --json "results/prompt/$1.json" > "$RUNS/$1-scores.txt" 2>&1
}

closed() {                                    # closed NAME FLAGS...: the ordinary B0 of as many steps
    local name=$1
    shift
    [ -e "results/prompt/$name.json" ] && return
    python train.py --data toy --size 64 128 --crop 64 128 --workers 0 --eval-every 100 --iters $STEPS \
        --lr 4.8e-3 --out "$RUNS/$name" "$@" > "$RUNS/$name.txt" 2>&1
    python eval.py "$RUNS/$name/last.pth" --json "results/prompt/$name.json" > /dev/null 2>&1
}

run teacher --student b2 --tokenizer bytes --lr 1.2e-3 --iters 300
T="--teacher $RUNS/teacher/last.pth"

fewer_bits() {                                # fewer_bits NAME: the whole table of one checkpoint
    [ -e "results/prompt/bits-$1.json" ] && return
    python -m extras.prompt compare "$RUNS/$1/last.pth" --modes fp32 fp16 int8 int4 int8+int4 \
        --json "results/prompt/bits-$1.json" > "results/prompt/bits-$1.txt" 2>&1
}

quantize() {                                  # quantize BITS FLAGS...: the CamVid B0
    local bits=$1
    shift
    [ -e "results/prompt/camvid-b0-$bits.json" ] && return
    python -m extras.quantize "$B0" --bits "$bits" --out "$RUNS/camvid-b0-$bits.pth" --data "camvid:$CAMVID" \
        --json "results/prompt/camvid-b0-$bits.json" "$@" > "results/prompt/camvid-b0-$bits.txt" 2>&1
}

# The first one that was run, longer and at another rate: what a packed prompt student is measured on.
run first-400-0 --iters 400 --eval-every 200 --lr 1.2e-3
fewer_bits first-400-0

for seed in 0 1; do
    run supervised-$seed --seed $seed
    score supervised-$seed
    run phase-2-$seed --seed $seed $T
    score phase-2-$seed
    run phase-1-half-$seed --seed $seed $T --phase 1 --iters $HALF
    run phase-1-2-$seed --seed $seed $T --phase 2 --iters $HALF --init "$RUNS/phase-1-half-$seed/last.pth"
    score phase-1-2-$seed
    closed closed-set-$seed --seed $seed
    if [ $seed = 0 ]; then
        run four-prompts-0 --prompts 4
        score four-prompts-0
        run no-absent-0 --absent 0
        score no-absent-0
        run no-empty-0 --empty 0
        score no-empty-0
        run many-empty-0 --empty 0.2
        score many-empty-0
        fewer_bits teacher
        if [ -e "$B0" ]; then
            quantize 8
            python -m extras.export "$B0" "$RUNS/camvid-b0-fp16.pth" --half > /dev/null
            python eval.py "$RUNS/camvid-b0-fp16.pth" --data "camvid:$CAMVID" \
                --json results/prompt/camvid-b0-fp16.json > /dev/null
            quantize 4 --layers
            quantize 4+8
        fi
        # 100 steps after the tokenizer changed: the text encoder new and the rest kept, or all of it new
        run swap-init-0 --iters $HALF --tokenizer bytes --init "$RUNS/supervised-0/last.pth" --reset-text
        score swap-init-0
        run swap-scratch-0 --iters $HALF --tokenizer bytes
        score swap-scratch-0
    fi
done
