#!/usr/bin/env bash
# X-Reasoner in miniature, on a laptop's CPU: base → text-only SFT → text-only GRPO, each measured on text and on images.
#
#   bash recipes/demo.sh                    the shipped base model, two processes; the last line is one JSON object
#   bash recipes/demo.sh --quick            a few steps of everything, to see that it runs (no result)
#   bash recipes/demo.sh --from_scratch     make the base model first
#   bash recipes/demo.sh --seed 1           another seed: data, order, samples (another folder, runs/demo-1)
#   bash recipes/demo.sh --controls         afterwards also: SFT without thoughts, GRPO without SFT, SFT with images
#   bash recipes/demo.sh --no_align         all of it from a base whose vision tokens were never aligned with its words
#
# A run that was stopped goes on where it was, with the same command (a base that is being made starts anew). What the
# miniature is: toy/world.py. NPROC=1: one process; RUNS=folder: where runs go; VENV=none: the python on the PATH, no .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=0 scratch=0 controls=0 align=1 seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --from_scratch) scratch=1 ;;
        --controls) controls=1 ;;
        --no_align) align=0 scratch=1 ;;
        --seed) seed=${2:?--seed needs a number}; shift
            case $seed in *[!0-9]*) echo "--seed $seed: not a number" >&2; exit 2 ;; esac ;;
        *) echo "unknown argument $1: --quick, --from_scratch, --controls, --no_align, --seed N" >&2; exit 2 ;;
    esac
    shift
done
[ "${VENV:-}" = none ] || . recipes/env.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# glibc gives freed memory back to the system at once and takes it again at every step; keeping it saves a third of the time
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_TOP_PAD_=67108864

out=${RUNS:-runs}/demo-$seed
[ $scratch = 0 ] || out=$out-from-scratch
[ $align = 1 ] || out=${out%-from-scratch}-no-align
data_size=(--conversations 24000 --problems 6000 --test 200) base_size=(--steps 1500) sft_size=(--steps 600)
grpo_size=(--steps 40 --prompts 32 --group 8)
if [ $quick = 1 ]; then
    out=$out-quick
    data_size=(--conversations 400 --problems 40 --test 4) base_size=(--align_steps 2 --steps 2) sft_size=(--steps 2)
    grpo_size=(--steps 2 --prompts 4 --group 2)
fi
[ $controls = 0 ] || data_size+=(--images)
model=toy/assets
[ $scratch = 0 ] || model=$out/base
launch() { torchrun --standalone --nproc_per_node="${NPROC:-2}" "$@"; }
say() { printf '\n== %d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
evaluate() {  # evaluate NAME MODEL SETS FLAGS…: greedy, unless the flags say otherwise
    local name=$1 model=$2 files=() task
    for task in $3; do files+=("$out/data/test_$task.jsonl"); done
    shift 3
    if [ ! -f "$out/eval-$name/result.json" ]; then
        launch eval.py --model "$model" --data "${files[@]}" --out "$out/eval-$name" --max_new_tokens 88 --think_budget 0 \
            --min_pixels 0 --max_pixels 0 --slots 128 --device cpu --graders 1 "$@" > "$out/eval-$name.log" 2>&1 ||
            { cat "$out/eval-$name.log"; exit 1; }
    fi
    sed -n '/^set /,$p' "$out/eval-$name.log" | sed '$d'  # the tables, without the line of JSON
}
finished() { [ "$(cat "$out/$1/status" 2>/dev/null)" = finished ]; }
sft() {  # sft NAME DATA FLAGS…: stage 1
    local name=$1 data=$2; shift 2
    finished "$name" || launch train_sft.py --model "$model" --data "$data" --out "$out/$name" --pack_len 512 \
        --batch_tokens 2048 --max_len 192 --lr 1e-3 --schedule linear --warmup_ratio 0.05 --checkpointing none \
        --save_every 200 --device cpu --seed "$seed" "${sft_size[@]}" "$@"
}
grpo() {  # grpo NAME MODEL: stage 2
    finished "$1" || launch train_grpo.py --model "$2" --data "$out/data/rl.jsonl" --out "$out/$1" --max_new_tokens 88 \
        --max_prompt_tokens 64 --lr 1e-4 --schedule linear --kl_coef 0 --slots 128 --checkpointing none --save_every 20 \
        --device cpu --graders 1 --seed "$seed" "${grpo_size[@]}"
}
all="text image ward_text ward_image hard_text hard_image"
avg5=(--samples 5 --temperature 0.3)              # the paper's second protocol
exits=(--budgets 16,32,48,64 --answer_budget 8)  # and what forced exit after so many tokens would have given

say "The world: chains such as a=9;k=a-3;  k? as text and as images of the same line; the ward asks in another dress" \
    "(P=9mg;Q=P-3; Q?) with lettered options. Look at $out/data/sft.jsonl and $out/data/img. Training will see text only."
last=test_hard_image  # of the files that are written
[ $controls = 0 ] || [ -f "$out/data/sft_images.jsonl" ] || last=sft_images  # asked for later than the others: all again
if [ ! -f "$out/data/$last.jsonl" ]; then python -m toy data --out "$out/data" --seed "$seed" "${data_size[@]}"; fi

if [ $scratch = 1 ]; then
    say "The base model, from nothing: reads text and images, answers at once. Notice 'characters': how many vision tokens" \
        "lie nearest to the embedding of the character that they show (with --no_align: to a rotation of it)."
    [ $align = 1 ] || base_size+=(--no_align)
    [ -f "$model/made_by.json" ] || python -m toy base --out "$model" --seed "$seed" "${base_size[@]}"
fi

say "Evaluation of the base. It answers at once: the longer the chain the worse (guessing a number: 10%), on text and images" \
    "alike. Of the ward's options it gets about half; a shortcut without any sum would get two thirds (toy/world.py)."
evaluate base "$model" "$all"
evaluate base-avg5 "$model" "text image" "${avg5[@]}"

say "Stage 1, text-only SFT on a teacher's long, correct thoughts (the paper: OpenThoughts). The vision tower is not even" \
    "loaded. Notice the loss: the form of a thought is learned in the first hundred steps, the sums in those that follow."
sft sft "$out/data/sft.jsonl"

say "Evaluation. Notice the images: no image was seen in training. And notice 'cut': like its teacher the student doubts" \
    "long chains again and again (;wait,) and some outputs never end. Forced exit (the lines with a budget) saves those."
evaluate sft "$out/sft/final" "$all" "${exits[@]}"
evaluate sft-avg5 "$out/sft/final" "text image" "${avg5[@]}"

say "Stage 2, text-only GRPO: 1 for a right answer that comes to its end, else 0 (the paper: Orz-Math). Notice that the" \
    "reward rises, while the length and the share of truncated samples fall."
grpo grpo "$out/sft/final"

say "Evaluation. Notice that outputs come to their end, on text and on images, and what that is worth."
evaluate grpo "$out/grpo/final" "$all" "${exits[@]}"
evaluate grpo-avg5 "$out/grpo/final" "text image" "${avg5[@]}"

say "The same without the images: what is left must be guessing."
evaluate blind "$out/grpo/final" "image ward_image hard_image" --blind

if [ $controls = 1 ]; then
    say "Control: is it the thought that transfers? The same questions, answers without thoughts."
    sft direct "$out/data/sft_direct.jsonl"
    evaluate direct "$out/direct/final" "$all"
    say "Control: does it need stage 1? The same reinforcement from the base."
    grpo rl_only "$model"
    evaluate rl_only "$out/rl_only/final" "$all"
    say "Control: how much is lost by training on text alone? Every second question shown as an image, the tower trained too."
    sft with_images "$out/data/sft_images.jsonl" --train_vision
    evaluate with_images "$out/with_images/final" "$all" "${exits[@]}"
fi

say "The report: open $out/report.html in a browser."
runs=()
for name in "base=base" "SFT=sft" "SFT + GRPO=grpo" "SFT, no thoughts=direct" "GRPO only=rl_only" \
            "SFT with images=with_images"; do
    for dir in "$out/eval-${name##*=}" "$out/eval-${name##*=}-avg5"; do
        [ ! -f "$dir/result.json" ] || runs+=("${name%=*}=$dir")
    done
done
python -m report "${runs[@]}" "$out/sft" "$out/grpo" --out "$out/report.html" --figure "$out/accuracy.svg" \
    --title "X-Reasoner in miniature, seed $seed"
say "Accuracy with 95% intervals, and with forced exit"
python -m toy table --out "$out" --base "$model" --final "$out/grpo/final"
