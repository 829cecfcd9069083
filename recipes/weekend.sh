#!/usr/bin/env bash
# X-Reasoner in a weekend on one GPU of 80 GB: Qwen2.5-VL-3B with LoRA, parts of both data sets, and
# a part of each benchmark.
#
#   bash recipes/weekend.sh                 rerun it to resume
#   SMOKE=1 bash recipes/weekend.sh         every line with tiny weights, on CPU in minutes
#   MODEL=Qwen/Qwen3-VL-4B-Instruct         a 4B
#
# Hours, disk and memory by arithmetic, not measured: docs/weekend.md.
#
# SFT: 30,000 rows of OpenThoughts of 4,000 to 11,000 characters, so that thought and answer fit in
# 4,096 tokens (of longer rows the paper's recipe cuts off the answer). GRPO: problems of Orz that
# the SFT model solved 1 to 3 times of 4, out of 8,000 that it was asked; the others teach little.
# Evaluation: 300 questions a benchmark, about ±5 points each.
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct} NPROC=${NPROC:-1} LORA=${LORA:-32}
RUNS=${RUNS:-runs/weekend}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BENCHMARKS=${BENCHMARKS:-gsm8k mmlu_pro mmmu_pro mathvista mathvision medqa}
chars=4000,11000 rows=30000 asked=8000 solved=0.25,0.75 tokens=2048
if [ "$SMOKE" = 1 ]; then
    chars=1,11000 rows=20 asked=4 solved=0,1 tokens=48  # random weights solve nothing
else
    SFT_FLAGS+=(--epochs 2 --overlong drop)
    GRPO_FLAGS+=(--steps 500 --prompts 64 --max_new_tokens $tokens)
    EVAL_FLAGS+=(--limit "${LIMIT:-300}" --max_new_tokens 3072) THINK=2800
fi

data openthoughts
data orz57k
pick openthoughts openthoughts_weekend --chars $chars --limit $rows
pick orz57k orz_asked --limit $asked
files=$(benchmarks $BENCHMARKS)

sft sft --model "$MODEL" --data "$DATA/openthoughts_weekend.jsonl"
evaluate asked --model "$RUNS/sft/final" --data "$DATA/orz_asked.jsonl" --limit 0 --samples 4 \
    --temperature 1 --max_new_tokens $tokens --think_budget 0 --prompt_style train
pick orz_asked orz_weekend --samples "$RUNS/eval/asked" --solved $solved
grpo x_reasoner --model "$RUNS/sft/final" --data "$DATA/orz_weekend.jsonl"

both_protocols base "$MODEL" - $files
both_protocols sft "$RUNS/sft/final" base $files
both_protocols x_reasoner "$RUNS/x_reasoner/final" base $files
compare base=base sft=sft x_reasoner=x_reasoner
