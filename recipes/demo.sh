#!/usr/bin/env bash
# X-Reasoner in miniature, on a laptop's CPU: base → text-only SFT → text-only GRPO, each measured on text and on images.
#
#   bash recipes/demo.sh                    the shipped base model, two processes; the last line is one JSON object
#   bash recipes/demo.sh --quick            a few steps of everything, to see that it runs (no result)
#   bash recipes/demo.sh --from_scratch     make the base model first
#   bash recipes/demo.sh --seed 1           another seed: data, order, samples (another folder, runs/demo-1)
#   bash recipes/demo.sh --controls         afterwards also: SFT on answers without thoughts, and GRPO without SFT
#
# A run that was stopped goes on where it was, with the same command. What the miniature is: toy.py. NPROC=1: one process.
set -euo pipefail
cd "$(dirname "$0")/.."
quick=0 scratch=0 controls=0 seed=0
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=1 ;;
        --from_scratch) scratch=1 ;;
        --controls) controls=1 ;;
        --seed) seed=${2:?--seed needs a number}; shift ;;
        *) echo "unknown argument $1: --quick, --from_scratch, --controls, --seed N" >&2; exit 2 ;;
    esac
    shift
done
. recipes/env.sh requirements.txt
# glibc gives freed memory back to the system at once and takes it again at every step; keeping it saves a third of the time
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_TOP_PAD_=67108864

out=runs/demo-$seed
[ $scratch = 0 ] || out=$out-from-scratch
data_size=(--conversations 24000 --problems 6000 --test 200) base_size=() sft_size=(--steps 450)
grpo_size=(--steps 40 --prompts 32 --group 8)
if [ $quick = 1 ]; then
    out=$out-quick
    data_size=(--conversations 400 --problems 40 --test 4) base_size=(--align_steps 2 --steps 2) sft_size=(--steps 2)
    grpo_size=(--steps 2 --prompts 4 --group 2)
fi
model=assets/toy_base
[ $scratch = 0 ] || model=$out/base
launch() { torchrun --standalone --nproc_per_node="${NPROC:-2}" "$@"; }
say() { printf '\n== %s\n' "$*"; }
evaluate() {  # evaluate NAME MODEL SETS FLAGS…: greedy
    local name=$1 model=$2 sets=$3; shift 3
    [ -f "$out/eval-$name/result.json" ] || launch eval.py --model "$model" --out "$out/eval-$name" \
        --data "$out"/data/test_*"$sets".jsonl --max_new_tokens 88 --min_pixels 0 --max_pixels 0 --slots 128 \
        --device cpu --graders 1 "$@" > "$out/eval-$name.log" 2>&1 || { cat "$out/eval-$name.log"; exit 1; }
    sed -n '/^set /,$p' "$out/eval-$name.log" | sed '$d'
}
finished() { [ "$(cat "$out/$1/status" 2>/dev/null)" = finished ]; }
sft() {  # sft NAME DATA: stage 1
    finished "$1" || launch train_sft.py --model "$model" --data "$2" --out "$out/$1" --pack_len 512 --batch_tokens 2048 \
        --max_len 192 --lr 1e-3 --schedule linear --warmup_ratio 0.05 --checkpointing none --save_every 200 --device cpu \
        --seed "$seed" "${sft_size[@]}"
}
grpo() {  # grpo NAME MODEL: stage 2
    finished "$1" || launch train_grpo.py --model "$2" --data "$out/data/rl.jsonl" --out "$out/$1" --max_new_tokens 88 \
        --max_prompt_tokens 64 --lr 1e-4 --schedule linear --kl_coef 0 --slots 128 --checkpointing none --save_every 20 --device cpu \
        --graders 1 --seed "$seed" "${grpo_size[@]}"
}
exits=(--budgets 64 --answer_budget 8)  # and what forced exit after 64 tokens of thought would have given

say "The world: chains such as a=9;k=a-3;k? as text and as images of the same line; the ward asks in another dress" \
    "(P=9mg;Q=P-3;Q?) with lettered options. Look at $out/data/sft.jsonl and $out/data/img. Training will see text only."
[ -f "$out/data/test_hard_image.jsonl" ] || python toy.py data --out "$out/data" --seed "$seed" "${data_size[@]}"

if [ $scratch = 1 ]; then
    say "The base model, from nothing: reads text and images, answers at once. Notice the alignment: how many characters" \
        "the vision tokens are nearest to. Without it (python toy.py base --no_align) hardly anything below transfers."
    [ -f "$model/made_by.json" ] || python toy.py base --out "$model" --seed "$seed" "${base_size[@]}"
fi

say "Evaluation of the base. Notice that it hardly beats guessing (10% of numbers, 25% of options), on text and images alike."
evaluate base "$model" ""

say "Stage 1, text-only SFT on a teacher's long, correct thoughts (the paper: OpenThoughts). The vision tower is not even" \
    "loaded. Notice how the loss falls in two steps: first the form of a thought, then the sums."
sft sft "$out/data/sft.jsonl"

say "Evaluation. Notice the images: no image was seen in training. And notice 'cut': like its teacher the student doubts" \
    "long chains again and again (;wait,) and some outputs never end. Forced exit (the lines with a budget) saves those."
evaluate sft "$out/sft/final" "" "${exits[@]}"

say "Stage 2, text-only GRPO: 1 for a right answer that comes to its end, else 0 (the paper: Orz-Math). Notice that the" \
    "reward rises, while the length and the share of truncated samples fall."
grpo grpo "$out/sft/final"

say "Evaluation. Notice that no output is cut any more, on text and on images, and what that is worth on each: on text much."
evaluate grpo "$out/grpo/final" "" "${exits[@]}"

say "The same without the images: what is left must be guessing."
evaluate blind "$out/grpo/final" image --blind

if [ $controls = 1 ]; then
    say "Controls. Is it the thought that transfers? The same questions, answers without thoughts."
    sft sft_direct "$out/data/sft_direct.jsonl"
    evaluate sft_direct "$out/sft_direct/final" ""
    say "And does it need stage 1? The same reinforcement from the base."
    grpo grpo_only "$model"
    evaluate grpo_only "$out/grpo_only/final" ""
fi

say "The report: open $out/report.html in a browser."
python report.py "base=$out/eval-base" "SFT=$out/eval-sft" "SFT + GRPO=$out/eval-grpo" "$out/sft" "$out/grpo" \
    --out "$out/report.html" --title "X-Reasoner in miniature, seed $seed"
say "Accuracy with 95% intervals, and with forced exit"
python toy.py table --out "$out" --base "$model" --final "$out/grpo/final"
