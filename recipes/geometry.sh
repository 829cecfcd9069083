#!/usr/bin/env bash
# GRPO on images: Geometry3K, 2,101 problems with a figure each, evaluated before and after on its
# test set and, for the way back from images to text, on GSM8K.
#
#   bash recipes/geometry.sh                 8 GPUs of 80 GB, from Qwen2.5-VL-7B-Instruct
#   MODEL=Qwen/Qwen3-VL-4B-Instruct bash recipes/geometry.sh
#   RL="--train_vision" RUNS=runs/tower bash recipes/geometry.sh      the vision tower trained too
#   SMOKE=1 bash recipes/geometry.sh         every line of it with tiny weights, on CPU in minutes
#
# PIXELS is the cap on an image's area: a token takes 28 x 28 pixels (Qwen3-VL: 32 x 32), so 401,408
# are at most 512 (392) tokens. Machines and other flags as in x_reasoner.sh. Not run on GPUs yet.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PIXELS=${PIXELS:-401408}
if [ "$SMOKE" != 1 ]; then EVAL_FLAGS=(--min_pixels 0 --max_pixels "$PIXELS"); fi

data geometry3k
data geometry3k_test
data gsm8k
files=("$DATA/geometry3k_test.jsonl" "$DATA/gsm8k.jsonl")

grpo geometry --model "$MODEL" --data "$DATA/geometry3k.jsonl" --max_pixels "$PIXELS"

evaluate geometry_base --model "$MODEL" --data "${files[@]}" --think_budget $THINK
evaluate geometry --model "$RUNS/geometry/final" --data "${files[@]}" --think_budget $THINK \
    --compare "$RUNS/eval/geometry_base"
