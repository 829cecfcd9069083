#!/usr/bin/env bash
# X-Reasoner from Qwen2.5-VL-7B-Instruct: data, supervised fine-tuning, GRPO, and evaluation beside
# the paper's tables.
#
#   bash recipes/x_reasoner.sh              8 GPUs of 80 GB; rerun it to resume
#   SMOKE=1 bash recipes/x_reasoner.sh      every line with tiny weights, on CPU in minutes
#
# Other machines, by arithmetic (docs/memory.md), not measured. The gradient does not depend on the
# number of GPUs, only the time does:
#   4 x 80 GB    NPROC=4
#   2 x 80 GB    NPROC=2 SFT="--adam_dtype bf16"
#                RL="--adam_dtype bf16 --offload_optimizer --micro_tokens 8192"
#   1 x 80 GB    NPROC=1 LORA=32: adapters instead of all weights; or all weights of the 3B:
#                NPROC=1 MODEL=Qwen/Qwen2.5-VL-3B-Instruct; within a weekend: recipes/weekend.sh
#   1 x 48 GB    NPROC=1 LORA=32 RL="--kv_gb 6 --micro_tokens 8192"
#   2 nodes      NNODES=2 NODE_RANK=0|1 MASTER=first-host:29500, the same command on both, on a
#                shared file system
# Newer models, 2B to 32B: MODEL=Qwen/Qwen3-VL-4B-Instruct (its KV cache takes 2.6 times as much).
# A smaller set of benchmarks: BENCHMARKS="gsm8k mmmu_pro"; a part of each: EVAL="--limit 300".
# The paper spent 8 h on 8 or 32 A100 (it says both) for SFT and 56 h on 32 A100 for GRPO;
# RL="--steps 100" is a start. What it leaves open, and what is done here: results/README.md.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
all="gsm8k mmlu_pro mmmu mmmu_pro mmstar mathvista mathvision"
all+=" medqa medqa_4ops medxpertqa_mm omnimedvqa nejm"
BENCHMARKS=${BENCHMARKS:-$all}

data openthoughts
data orz57k
files=$(benchmarks $BENCHMARKS)

sft sft --model "$MODEL" --data "$DATA/openthoughts.jsonl"
grpo x_reasoner --model "$RUNS/sft/final" --data "$DATA/orz57k.jsonl"

both_protocols base "$MODEL" - $files
both_protocols sft "$RUNS/sft/final" base $files
both_protocols x_reasoner "$RUNS/x_reasoner/final" base $files
compare base=base sft=sft x_reasoner=x_reasoner
