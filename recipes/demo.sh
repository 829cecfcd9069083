#!/usr/bin/env bash
# X-Reasoner in miniature on a laptop's CPU: base → text-only SFT → text-only GRPO, each
# measured on text and on images.
#
#   bash recipes/demo.sh                  shipped base model, two processes; ends with a line of JSON
#   bash recipes/demo.sh --quick          two steps of everything, to see that it runs (no results)
#   bash recipes/demo.sh --from_scratch   train the base model first
#   bash recipes/demo.sh --seed 1         another seed: data, order, samples (in runs/demo-1)
#   bash recipes/demo.sh --controls       also GRPO without SFT, SFT with images, avg@8, pass@8 and
#                                         maj@8, chains of eight statements
#   bash recipes/demo.sh --no_align       everything from a base whose vision tokens were not
#                                         aligned with its embeddings
#
# Rerun the same command to resume. toy/world.py describes the task. Environment: NPROC=1 for one
# process, RUNS=folder for the runs, VENV=none for the python on the PATH instead of .venv.
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
        *) echo "unknown argument $1 (see the head of recipes/demo.sh)" >&2; exit 2 ;;
    esac
    shift
done
[ "${VENV:-}" = none ] || . recipes/env.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# glibc returns freed memory to the system at once; keeping it saves a third of the time
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456
export MALLOC_TOP_PAD_=67108864

out=${RUNS:-runs}/demo-$seed
[ $scratch = 0 ] || out=$out-from-scratch
[ $align = 1 ] || out=${out%-from-scratch}-no-align
data_size=(--conversations 4000 --problems 2000 --test 400) base_size=(--steps 1500)
sft_size=(--steps 90) grpo_size=(--steps 60 --prompts 32 --group 8)
if [ $quick = 1 ]; then
    out=$out-quick
    data_size=(--conversations 400 --problems 40 --test 4) base_size=(--align_steps 2 --steps 2)
    sft_size=(--steps 2) grpo_size=(--steps 2 --prompts 4 --group 2)
fi
[ $controls = 0 ] || data_size+=(--images)
model=toy/assets
[ $scratch = 0 ] || model=$out/base

launch() { torchrun --standalone --nproc_per_node="${NPROC:-2}" "$@"; }
say() { printf '\n== %d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }
finished() { [ "$(cat "$out/$1/status" 2>/dev/null)" = finished ]; }
evaluate() {  # evaluate NAME MODEL SETS FLAGS…: greedy, unless the flags say otherwise
    local name=$1 model=$2 files=() task
    for task in $3; do files+=("$out/data/test_$task.jsonl"); done
    shift 3
    [ ! -f "$out/eval-$name/result.json" ] || return 0
    launch eval.py --model "$model" --data "${files[@]}" --out "$out/eval-$name" \
        --max_new_tokens 72 --think_budget 0 --min_pixels 0 --max_pixels 0 --slots 128 \
        --device cpu --graders 1 "$@" > "$out/eval-$name.log" 2>&1 ||
        { cat "$out/eval-$name.log"; exit 1; }
}
sft() {  # sft NAME DATA FLAGS…: stage one
    local name=$1 data=$2; shift 2
    finished "$name" || launch train_sft.py --model "$model" --data "$out/data/$data.jsonl" \
        --out "$out/$name" --pack_len 512 --batch_tokens 2048 --max_len 192 --lr 1e-3 \
        --schedule linear --warmup_ratio 0.05 --checkpointing none --save_every 200 \
        --device cpu --seed "$seed" "${sft_size[@]}" "$@"
}
grpo() {  # grpo NAME MODEL: stage two
    finished "$1" || launch train_grpo.py --model "$2" --data "$out/data/rl.jsonl" \
        --out "$out/$1" --max_new_tokens 72 --max_prompt_tokens 80 --lr 3e-4 --schedule linear \
        --kl_coef 0 --slots 128 --checkpointing none --save_every 20 --device cpu --graders 1 \
        --seed "$seed" "${grpo_size[@]}"
}
sets="text image ward_text ward_image"
exits=(--budgets 64 --answer_budget 6)           # forced exit after 64 tokens of thought
votes=(--samples 8 --temperature 1 --limit 200)  # avg@8, pass@8 and maj@8

say "The task: chains such as a=9;k=a#;k? as text, and as images of the same line. The ward asks" \
    "in another format (a:9,k:a#,k?) with options. Training sees text only: $out/data/sft.jsonl"
last=test_hard_image  # the last of the data files
[ $controls = 0 ] || [ -f "$out/data/sft_images.jsonl" ] || last=sft_images  # write all files again
if [ ! -f "$out/data/$last.jsonl" ]; then
    python -m toy data --out "$out/data" --seed "$seed" "${data_size[@]}"
fi

if [ $scratch = 1 ]; then
    say "The base model, trained from nothing. 'characters': share of vision tokens nearest to" \
        "the embedding of the character that they show (with --no_align: to a rotation of it)."
    [ $align = 1 ] || base_size+=(--no_align)
    [ -f "$model/made_by.json" ] ||
        python -m toy base --out "$model" --seed "$seed" "${base_size[@]}"
fi
evaluate base "$model" "$sets"

say "Control: SFT on the same questions, answers without thoughts. The loss stays high."
sft direct sft_direct
evaluate direct "$out/direct/final" "$sets"

say "Stage one: text-only SFT with thoughts (the paper: OpenThoughts). No vision tower is loaded."
sft sft sft
evaluate sft "$out/sft/final" "$sets" "${exits[@]}"

say "Stage two: text-only GRPO (the paper: Orz-Math), reward 1 if right, else 0. The reward rises."
grpo grpo "$out/sft/final"
evaluate grpo "$out/grpo/final" "$sets" "${exits[@]}"
evaluate blind "$out/grpo/final" "image ward_image" --blind

if [ $controls = 1 ]; then
    say "Control: GRPO without stage one."
    grpo rl_only "$model"
    evaluate rl_only "$out/rl_only/final" "$sets" "${exits[@]}"
    say "Control: SFT with every second question as an image, vision tower trained too."
    sft with_images sft_images --train_vision
    evaluate with_images "$out/with_images/final" "$sets" "${exits[@]}"
    say "Chains of eight statements, longer than any in SFT; eight samples a question."
    for name in sft grpo; do
        evaluate $name-long "$out/$name/final" "hard_text hard_image" "${exits[@]}"
        evaluate $name-votes "$out/$name/final" "text image" "${votes[@]}"
    done
fi

runs=()
for name in "base=base" "SFT, no thoughts=direct" "SFT=sft" "SFT + GRPO=grpo" \
            "GRPO only=rl_only" "SFT with images=with_images"; do
    dir=$out/eval-${name##*=}
    [ ! -f "$dir/result.json" ] || runs+=("${name%=*}=$dir")
done
python -m report "${runs[@]}" "$out/sft" "$out/grpo" --out "$out/report.html" \
    --figure "$out/accuracy.svg" --title "X-Reasoner in miniature, seed $seed"
say "Done. Curves and samples: $out/report.html. Accuracy with 95% intervals:"
python -m toy table --out "$out" --base "$model" --final "$out/grpo/final"
