#!/usr/bin/env bash
# Every run behind the CamVid tables of docs/RESULTS.md, a line each. What was done here is skipped,
# what was cut short goes on.
#
#   DATA=camvid:DIR ./reproduce.sh short              all rows: hours on 2 CPU cores
#   DATA=camvid:DIR ./reproduce.sh full               40,000 steps and 3 seeds: for a GPU
#   DATA=camvid:DIR ./reproduce.sh short b0 b0-kd     these rows, and before b0-kd its teacher
#   DATA=camvid:DIR ./reproduce.sh levers             what the baseline gains by, scored on val only
#   DATA=camvid:DIR ./reproduce.sh rates              each row's learning rate, scored on val only
#   DATA=camvid:DIR ./reproduce.sh registered         the study that docs/RESULTS.md registered
#   DATA=camvid:DIR STUDY=small ./reproduce.sh rates  the small one of it, in fp32; and registered
#   DATA=camvid:DIR STUDY=small-bf16 ./reproduce.sh rates   that one in bf16, from a better teacher
#   DATA=camvid:DIR STUDY=small-losses ./reproduce.sh rates  others' losses, each for as long as CSKD
#   DATA=camvid:DIR ./reproduce.sh weights            the best B0 without a teacher
#   DATA=camvid:DIR ./reproduce.sh record             the best that we can: B2, and the B0 that it
#                                                     teaches, which weights/ holds
#   python -m extras.paper_tables --figures           the tables and figures of what is there
#
# Before it may stand
#   SEEDS="0 1 2"
#   TEACHER=1                           learn from the teacher of that seed (0)
#   AMP=bf16                            or off, or fp16 (train.py's auto: fp16 on CUDA, else off;
#                                       levers, rates, registered, weights and record: bf16;
#                                       with STUDY=small always off)
#   RATES="6e-4 9.6e-3"                 the grid of `rates`
#   LONG=12000                          steps of the registered rows (not with STUDY)
#   FLAGS="--cache DIR --workers 8"     more flags of train.py, for every row
#   STEPS=2                             of every run: to try this script
#
# A row trains in runs/camvid-SCHEDULE/ROW-SEED (weights) and leaves log, recipe and scores in
# results/camvid-SCHEDULE/ROW/SEED, in place of those of ours that are there: git diff shows how
# yours differ. With STUDY=small it is camvid-small-SCHEDULE, and so on. Nothing is selected: the last
# checkpoint is scored, once, on the 233 test frames (in the study: on the held-out fold; levers and
# rates: on val).
set -euo pipefail
case ${1:-} in
  short)
    teacher=3000 student=600 long=3000 study_teacher=600 study=400
    every=5                             # validations in a run
    seeds=${SEEDS:-0}
    ;;
  full)
    teacher=40000 student=40000 long=80000 study_teacher=40000 study=40000
    every=40
    seeds=${SEEDS:-0 1 2}
    ;;
  levers)
    medium=3000
    every=5
    seeds=${SEEDS:-0}
    AMP=${AMP:-bf16}
    ;;
  rates | registered)
    medium=3000 long=${LONG:-12000}
    every=5
    seeds=0
    [[ $1 == registered ]] && seeds="0 1 2"
    seeds=${SEEDS:-$seeds}
    AMP=${AMP:-bf16}
    teacher=$long
    if [[ ${STUDY:-} == small ]]; then
      medium=1000 long=1000 teacher=1000
      every=4
      AMP=off
    elif [[ ${STUDY:-} == small-bf16 || ${STUDY:-} == small-losses ]]; then
      medium=1000 long=1000 teacher=3000
      every=4
    fi
    if [[ ${STUDY:-} == small-losses && $1 == registered ]]; then
      seeds=${SEEDS:-0 1}
    fi
    few_teacher=$teacher                # with a share of the labels
    if [[ ${STUDY:-} == small-bf16 ]]; then
      few_teacher=2000
    fi
    ;;
  weights)
    long=6000
    every=5
    seeds=${SEEDS:-0}
    AMP=${AMP:-bf16}
    ;;
  record)
    teacher=3000 long=6000
    every=5
    seeds=${SEEDS:-0}
    AMP=${AMP:-bf16}
    ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$0"
    exit 2
    ;;
esac
if [[ -n ${STEPS:-} ]]; then
  teacher=$STEPS student=$STEPS long=$STEPS study_teacher=$STEPS study=$STEPS medium=$STEPS
  few_teacher=$STEPS
  every=1
fi
schedule=$1
prefix=camvid
if [[ -n ${STUDY:-} ]]; then
  if [[ ! $STUDY =~ ^(small|small-bf16|small-losses)$ ]]; then
    echo "error: STUDY is small, small-bf16, small-losses or nothing" >&2
    exit 2
  fi
  if [[ $schedule != rates && $schedule != registered ]]; then
    echo "error: STUDY is for rates and registered" >&2
    exit 2
  fi
  prefix=camvid-$STUDY
fi
table=$prefix-$schedule                  # the folder in runs/ and results/
shift
wanted=" $* "
: "${DATA:?say where CamVid is: DATA=camvid:DIR $0 $schedule}"
teachers=                               # a line each: NAME STEPS FLAGS

is_wanted() {  # NAME
  [[ $wanted == "  " || $wanted == *" $1 "* ]]
}

row() {  # NAME STEPS FLAGS
  if is_wanted "$1"; then
    run "$@"
  fi
}

teacher_row() {  # NAME STEPS FLAGS: run before the first row that learns from it, wanted or not
  teachers+="$*"$'\n'
  seeds=${TEACHER:-0} row "$@"
}

run() {  # NAME STEPS FLAGS: train, score the last checkpoint, keep the small files
  local name=$1 steps=$2 seed
  shift 2
  for seed in $seeds; do
    local run=runs/$table/$name-$seed
    local out=results/$table/$name/$seed
    if [[ -e $run/recipe.json ]] && ! was_begun_so "$run" "$steps" "$@"; then
      echo "error: $run was begun with other flags than this row has now (its recipe.json tells" \
           "them): move it and $out away, and run this again" >&2
      exit 3
    fi
    if cmp -s "$run/scores.csv" "$out/scores.csv"; then
      continue                          # the results are of the run that is here
    fi
    run_its_teacher "$@"
    mkdir -p "$out"
    if [[ -e $run/last.pth ]]; then
      python train.py --resume --out "$run"
    else
      python train.py --data "$DATA" --iters "$steps" --eval-every $((steps / every)) \
        --amp "${AMP:-auto}" --seed "$seed" --out "$run" "$@" ${FLAGS:-}
    fi
    if [[ $(tail -n1 "$run/log.csv") != "$steps,"* ]]; then
      echo "error: $run was stopped before step $steps: run this again, and it goes on" >&2
      exit 3
    fi
    if [[ " $* " == *" --fold "* ]]; then
      local fold=("${@:$#-3:4}")        # the study's flags end with --fold N --fold-by HOW
      score "$run" --split val "${fold[@]}" --json "$out/test.json"
    elif [[ $schedule != levers && $schedule != rates ]]; then
      score "$run" --split test --json "$out/test.json"
      score "$run" --split test --quarter --json "$out/quarter.json"
    fi
    if [[ -e $run/fit.csv ]]; then
      cp "$run/fit.csv" "$out"
    fi
    # scores.csv last: it says that all is there
    cp "$run"/{log.csv,recipe.json,scores.csv} "$out"
  done
}

was_begun_so() {  # RUN STEPS FLAGS: is this what the run was begun with?
  local begun flags="${*:3}"
  begun=$(grep -m1 '"command":' "$1/recipe.json") || return
  if [[ $begun != *" --iters $2 "* ]]; then
    return 1
  fi
  if [[ $begun == *" --amp "* && $begun != *" --amp ${AMP:-auto} "* ]]; then
    return 1
  fi
  [[ $begun == *" $flags"[\ \"]* ]]    # after them FLAGS, of the machine, or the end
}

run_its_teacher() {  # FLAGS: where they name a teacher_row's run, that one goes first
  local teacher_name teacher_flags
  if [[ " $* " =~ " --teacher runs/$table/"([^/]+)-[0-9]+/ ]]; then
    teacher_name=${BASH_REMATCH[1]}
    if teacher_flags=$(grep "^$teacher_name " <<<"$teachers"); then
      seeds=${TEACHER:-0} run $teacher_flags
    fi
  fi
}

score() {  # RUN FLAGS
  python eval.py "$1/last.pth" --data "$DATA" "${@:2}"
}

# What the baseline gains by: chosen on val, before anything is distilled (docs/RESULTS.md)
if [[ $schedule == levers ]]; then
  SMALL=(--student b0 --size 288 384 --crop 288 384)
  NATIVE=(--student b0 --size 360 480 --crop 360 480)
  GENTLE=(--scale-range 0.75 1.5)
  for lr in 6e-4 1.2e-3 2.4e-3 4.8e-3; do
    row "plain-native-lr$lr"      "$medium" --student b0 --augment plain --crop 360 480 --lr "$lr"
    row "plain-small-lr$lr"       "$medium" --student b0 --augment plain --crop 288 384 --lr "$lr"
    row "gentle-native-lr$lr"     "$medium" "${NATIVE[@]}" "${GENTLE[@]}" --lr "$lr"
    row "gentle-small-lr$lr"      "$medium" "${SMALL[@]}" "${GENTLE[@]}" --lr "$lr"
    row "segformer-native-lr$lr"  "$medium" "${NATIVE[@]}" --lr "$lr"
    row "segformer-small-lr$lr"   "$medium" "${SMALL[@]}" --lr "$lr"
  done
  for frames in native small; do
    if [[ $frames == native ]]; then
      PLAIN=(--student b0 --augment plain --crop 360 480 --lr 1.2e-3)
    else
      PLAIN=(--student b0 --augment plain --crop 288 384 --lr 1.2e-3)
    fi
    row "plain-$frames-ema-lr1.2e-3"        "$medium" "${PLAIN[@]}" --ema 0.999
    row "plain-$frames-dice-lr1.2e-3"       "$medium" "${PLAIN[@]}" --loss wce-dice --lambda-dice 1
    row "plain-$frames-sqrt-lr1.2e-3"       "$medium" "${PLAIN[@]}" --class-weights sqrt
    row "plain-$frames-dice-sqrt-lr1.2e-3"  "$medium" "${PLAIN[@]}" --loss wce-dice --lambda-dice 1 \
                                            --class-weights sqrt
    row "plain-$frames-decay0.01-lr1.2e-3"  "$medium" "${PLAIN[@]}" --weight-decay 0.01
    row "plain-$frames-decay0.05-lr1.2e-3"  "$medium" "${PLAIN[@]}" --weight-decay 0.05
  done
  exit
fi

# What weights/ held before the record: an hour on one core, by the levers so far, its rate not
# searched
if [[ $schedule == weights ]]; then
  row b0-dyt "$long" --student b0 --norm dyt --augment plain --crop 360 480 --lr 1.2e-3 --fit-log
  exit
fi

# The best that we can on one core: whole frames, and the class weights that won among the levers
if [[ $schedule == record ]]; then
  BOTH=(--norm dyt --augment plain --crop 360 480 --class-weights sqrt --fit-log)
  TAUGHT=(--student b0 "${BOTH[@]}" --lr 2.4e-3 --lambda-fd 1 --lambda-pe 0
          --teacher "runs/$table/teacher-${TEACHER:-0}/last.pth"
          --teacher-cache "runs/$table-answers")
  teacher_row teacher     "$teacher" --student b2 "${BOTH[@]}" --lr 1.2e-3
  row b0-dyt-fd           "$long" "${TAUGHT[@]}"
  row b0-dyt-fd-with-val  "$long" "${TAUGHT[@]}" --with-val
  exit
fi

# What docs/RESULTS.md registered. In the order in which one run needs another:
#   levers;  rates b2 b2-dyt;  registered teacher second-teacher;  rates;  registered
if [[ $schedule == rates || $schedule == registered ]]; then
  WON=(--augment plain --crop 360 480 --fit-log)          # the best of the levers on val so far
  kept=                                 # where a teacher's answers are kept
  if [[ $prefix == camvid-small* ]]; then
    WON=(--augment plain --crop 192 256 --fit-log)
    kept="--teacher-cache runs/$prefix-answers"
  fi
  teacher_file=runs/$prefix-registered/teacher-0/last.pth
  second_teacher_file=runs/$prefix-registered/teacher-1/last.pth

  flags_of() {  # ROW: what makes it this row, but for its learning rate
    local dyt="--student b0 --norm dyt"
    local taught="--teacher $teacher_file $kept --lambda-fd 0 --lambda-pe 0"
    case $1 in
      b2)              echo "--student b2" ;;
      b2-dyt)          echo "--student b2 --norm dyt" ;;
      b0)              echo "--student b0" ;;
      b0-dyt*-long*)   echo "$dyt" ;;
      b0-dyt)          echo "$dyt" ;;
      b0-fd)           echo "--student b0 $taught --lambda-fd 1" ;;
      b0-dyt-fd)       echo "$dyt $taught --lambda-fd 1" ;;
      b0-dyt-kd)       echo "$dyt $taught --lambda-fd 1 --lambda-pe 1" ;;
      b0-dyt-cosine)   echo "$dyt $taught --lambda-cosine 1" ;;
      b0-dyt-gcos)     echo "$dyt $taught --lambda-gcos 1" ;;
      b0-dyt-cwd)      echo "$dyt $taught --lambda-cwd 1" ;;
      b0-dyt-dist)     echo "$dyt $taught --lambda-dist 1" ;;
      b0-dyt-kl)       echo "$dyt $taught --lambda-kl 1 --temperature 4" ;;
      b0-dyt-zkl)      echo "$dyt $taught --lambda-zkl 1" ;;
      b0-dyt-kl-two)   echo "$dyt $taught --lambda-kl 1 --temperature 4 --flip-teacher" \
                            "--second-teacher $second_teacher_file" ;;
    esac
  }

  steps_of() {  # ROW: its steps, the same in `rates` and in `registered`
    if [[ $prefix == camvid-small-losses && -z ${STEPS:-} ]]; then
      steps_in_the_time_of_cskd "$1"
      return
    fi
    case $1 in
      b0-dyt-as-long)           matched_steps b0-dyt-fd ;;
      b0-dyt-as-long-as-both)   matched_steps b0-dyt-fd --and results/$prefix-registered/teacher/0 ;;
      b0 | b0-dyt | b0-fd | b0-dyt-fd)  echo "$long" ;;
      *)                        echo "$medium" ;;
    esac
  }

  matched_steps() {  # ROW: for how many steps is b0-dyt trained in the time that this takes?
    if [[ -n ${STEPS:-} ]]; then
      echo "$STEPS"
      return
    fi
    # Those of the small studies were timed apart, not by runs that were disturbed: docs/RESULTS.md
    case "$prefix $*" in
      "camvid-small b0-dyt-fd")         echo 1325 ;;
      "camvid-small b0-dyt-fd "*)       echo 5918 ;;
      "camvid-small-bf16 b0-dyt-fd")    echo 1297 ;;
      "camvid-small-bf16 b0-dyt-fd "*)  echo 12816 ;;
      *)  python -m extras.registered steps results/$prefix-rates b0-dyt "$@" ;;
    esac
  }

  # What a step takes of each was timed apart: docs/RESULTS.md
  steps_in_the_time_of_cskd() {  # ROW
    case $1 in
      b0-dyt-as-long)  echo 1403 ;;
      b0-dyt-fd)       echo 1000 ;;
      b0-dyt-kd)       echo 912 ;;
      b0-dyt-cosine)   echo 1088 ;;
      b0-dyt-gcos)     echo 1056 ;;
      b0-dyt-cwd)      echo 1169 ;;
      b0-dyt-dist)     echo 1165 ;;
      b0-dyt-kl)       echo 1018 ;;
      b0-dyt-kl-two)   echo 1018 ;;     # as many as KL from one, in more time
      b0-dyt-zkl)      echo 997 ;;
    esac
  }

  TEACHERS=(b2 b2-dyt)
  if [[ $prefix == camvid-small* ]]; then
    TEACHERS=()                         # not searched: best_teacher
  fi
  ROWS=(b0 b0-dyt b0-fd b0-dyt-fd b0-dyt-as-long b0-dyt-as-long-as-both)
  SECONDARY=(b0-dyt-cosine b0-dyt-gcos b0-dyt-cwd b0-dyt-dist b0-dyt-kl b0-dyt-zkl b0-dyt-kl-two)
  if [[ $prefix == camvid-small-losses ]]; then
    ROWS=(b0-dyt-as-long b0-dyt-fd)
    SECONDARY=(b0-dyt-kd b0-dyt-cosine b0-dyt-gcos b0-dyt-cwd b0-dyt-dist b0-dyt-kl b0-dyt-zkl
               b0-dyt-kl-two)
  fi
fi

# Every row at every rate of the grid, at its own schedule
if [[ $schedule == rates ]]; then
  for name in "${TEACHERS[@]}" "${ROWS[@]}" "${SECONDARY[@]}"; do
    if is_wanted "$name"; then
      steps=$(steps_of "$name")
      for lr in ${RATES:-6e-4 1.2e-3 2.4e-3 4.8e-3}; do
        run "$name-lr$lr" "$steps" $(flags_of "$name") "${WON[@]}" --lr "$lr"
      done
    fi
  done
  exit
fi

if [[ $schedule == registered ]]; then
  best_of() {  # ROW...: "ROW-lrRATE", the best on val
    python -m extras.registered best results/$prefix-rates "$@"
  }

  best_teacher() {
    if [[ $prefix == camvid-small* ]]; then
      echo b2-dyt-lr1.2e-3              # not searched: a run of it takes too long
    else
      best_of b2 b2-dyt
    fi
  }

  chosen_row() {  # NAME STEPS BEST FLAGS: run NAME as BEST, a ROW-lrRATE, and with FLAGS
    local name=$1 steps=$2 best=$3
    shift 3
    run "$name" "$steps" $(flags_of "${best%-lr*}") "${WON[@]}" --lr "${best##*-lr}" "$@"
  }

  take_over() {  # ROW STEPS BEST: seed 0 at this rate was trained already, to find the rate
    local from=runs/$prefix-rates/$3-0 to=runs/$prefix-registered/$1-0
    if [[ -e $from/last.pth && ! -e $to && $(tail -n1 "$from/log.csv") == "$2,"* ]]; then
      mkdir -p runs/$prefix-registered
      cp -r "$from" "$to"
    fi
  }

  if is_wanted teacher; then
    best=$(best_teacher)
    seeds=0 chosen_row teacher "$teacher" "$best"
  fi
  if is_wanted second-teacher; then
    best=$(best_teacher)
    seeds=1 chosen_row teacher "$teacher" "$best"
  fi
  for name in "${ROWS[@]}"; do
    if is_wanted "$name"; then
      best=$(best_of "$name")
      steps=$(steps_of "$name")
      take_over "$name" "$steps" "$best"
      chosen_row "$name" "$steps" "$best"
    fi
  done
  for name in "${SECONDARY[@]}"; do
    if is_wanted "$name"; then
      best=$(best_of "$name")
      steps=$(steps_of "$name")
      take_over "$name" "$steps" "$best"
      seeds=${SEEDS:-0 1} chosen_row "$name" "$steps" "$best"
    fi
  done

  # Features first, without labels, and labels after: half of the steps each, or of CSKD's time
  if is_wanted b0-dyt-features-first; then
    features=$(best_of b0-dyt-fd)
    if [[ $prefix == camvid-small-losses ]]; then
      labels=$(best_of b0-dyt-as-long)
      label_steps=597                   # a step without a teacher takes less: docs/RESULTS.md
    else
      labels=$(best_of b0-dyt)
      label_steps=$((medium / 2))
    fi
    for seed in ${SEEDS:-0 1}; do
      seeds=$seed chosen_row features-only $((medium / 2)) "$features" --loss none
      seeds=$seed chosen_row b0-dyt-features-first "${STEPS:-$label_steps}" "$labels" \
        --init "runs/$prefix-registered/features-only-$seed/last.pth"
    done
  fi

  if [[ $prefix == camvid-small-losses ]]; then
    exit
  fi

  # Few labels: a teacher with a share of them, a student with the same alone, and one that this
  # teacher teaches on all frames
  few_alone=$long
  if [[ $prefix == camvid-small-bf16 && -z ${STEPS:-} ]]; then
    few_alone=1576                      # as long as a taught one, timed apart: docs/RESULTS.md
  fi
  for share in 0.25 0.5; do
    if is_wanted "few-$share"; then
      best=$(best_teacher)
      seeds=0 chosen_row "few-$share-teacher" "$few_teacher" "$best" --labelled "$share"
      best=$(best_of b0-dyt)
      chosen_row "few-$share-alone" "$few_alone" "$best" --labelled "$share"
      best=$(best_of b0-dyt-fd)
      chosen_row "few-$share-taught" "$long" "$best" --labelled "$share" --lambda-kl 1 \
        --teacher "runs/$prefix-registered/few-$share-teacher-0/last.pth"
    fi
  done
  exit
fi

# The paper's Table 2, on the official split
T=(--student b0 --teacher "runs/$table/b2-${TEACHER:-0}/last.pth")
teacher_row b2  "$teacher" --student b2
row b0          "$student" --student b0
row b0-dyt      "$student" --student b0 --norm dyt
row b0-dyt-dyl  "$student" --student b0 --norm dyt-dyl
row b0-kd       "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 1
row b0-df       "$student" --student b0 --loss dice-focal
row b0-fd       "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 0
row b0-pe       "$student" "${T[@]}" --lambda-fd 0 --lambda-pe 1
row b0-dyt-fd   "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 0 --norm dyt
row b0-kl-1     "$student" "${T[@]}" --lambda-fd 0 --lambda-pe 0 --lambda-kl 1 --temperature 1
row b0-kl-4     "$student" "${T[@]}" --lambda-fd 0 --lambda-pe 0 --lambda-kl 1 --temperature 4
row b0-all      "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 1 --lambda-kl 1 --temperature 4 \
                --loss dice-focal --norm dyt-dyl

# Is it only the learning rate? The baseline and what paid, from half the rate to eight times
for lr in 3e-4 1.2e-3 2.4e-3 4.8e-3; do
  row "b0-lr-$lr"          "$student" --student b0 --lr "$lr"
  row "b0-dyt-lr-$lr"      "$student" --student b0 --norm dyt --lr "$lr"
  row "b0-kd-lr-$lr"       "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 1 --lr "$lr"
  row "b0-dyt-fd-lr-$lr"   "$student" "${T[@]}" --lambda-fd 1 --lambda-pe 0 --norm dyt --lr "$lr"
done

# Trained for longer: plain, with what the paper distils, and with what paid in the rows above
row b0-long         "$long" --student b0
row b0-kd-long      "$long" "${T[@]}" --lambda-fd 1 --lambda-pe 1
row b0-dyt-long     "$long" --student b0 --norm dyt
row b0-dyt-fd-long  "$long" "${T[@]}" --lambda-fd 1 --lambda-pe 0 --norm dyt

# Longer, at the rates that were best on val at the short schedule, from the same teacher; then from
# a teacher with DyT, at a rate that was taken over from B0, not searched
row b0-tuned         "$long" --student b0 --lr 1.2e-3
row b0-kd-tuned      "$long" "${T[@]}" --lambda-fd 1 --lambda-pe 1 --lr 2.4e-3
row b0-dyt-tuned     "$long" --student b0 --norm dyt --lr 1.2e-3
row b0-dyt-fd-tuned  "$long" "${T[@]}" --lambda-fd 1 --lambda-pe 0 --norm dyt --lr 2.4e-3
teacher_row b2-tuned "$teacher" --student b2 --norm dyt --lr 1.2e-3
T=(--student b0 --teacher "runs/$table/b2-tuned-${TEACHER:-0}/last.pth")
row b0-dyt-fd-b2-tuned "$long" "${T[@]}" --lambda-fd 1 --lambda-pe 0 --norm dyt --lr 2.4e-3

# The CamVid KL study: 2 folds, by whole drives and, to show the leak, by shuffled frames
every=$((every > 2 ? every / 2 : 1))    # the held-out fold is half of CamVid: looked at less often
for by in drive shuffle; do
  for fold in 0 1; do
    F=(--fold "$fold" --fold-by "$by")
    T=(--student b0 --teacher "runs/$table/study-$by-$fold-b2-${TEACHER:-0}/last.pth"
       --lambda-fd 0 --lambda-pe 0 --temperature 4)
    teacher_row "study-$by-$fold-b2"      "$study_teacher" --student b2 "${F[@]}"
    seeds=0 row "study-$by-$fold-b0"      "$study" --student b0 "${F[@]}"
    seeds=0 row "study-$by-$fold-kl-1.0"  "$study" "${T[@]}" --lambda-kl 1.0 "${F[@]}"
    seeds=0 row "study-$by-$fold-kl-0.5"  "$study" "${T[@]}" --lambda-kl 0.5 "${F[@]}"
  done
done
