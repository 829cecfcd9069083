#!/usr/bin/env bash
# X-Reasoner-Med from X-Reasoner: a teacher's traces for MedQA by rejection sampling, SFT on them,
# GRPO on MedQA, and the medical evaluation. Run recipes/x_reasoner.sh first, or name a model:
# MODEL=microsoft/X-Reasoner-7B.
#
#   bash recipes/x_reasoner_med.sh            machines and flags as in x_reasoner.sh
#   SMOKE=1 bash recipes/x_reasoner_med.sh    every line with tiny weights, on CPU in minutes
#
# TEACHER=Qwen/QwQ-32B is the paper's. Each GPU holds the whole teacher while it samples, 65 GB in
# bf16: that asks for GPUs of more than 80 GB. On smaller ones take another model of the Qwen2
# family that thinks, for instance TEACHER=deepseek-ai/DeepSeek-R1-Distill-Qwen-14B.
# SAMPLES=4 a question (the paper does not say how many).
FROM=${MODEL:-}
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
FROM=${FROM:-$RUNS/x_reasoner/final}
[ "$SMOKE" != 1 ] || [ -d "$FROM" ] || FROM=$RUNS/base
TEACHER=${TEACHER:-Qwen/QwQ-32B} SAMPLES=${SAMPLES:-4}
BENCHMARKS=${BENCHMARKS:-medqa medqa_4ops mmlu_pro mmmu mmmu_pro medxpertqa_mm omnimedvqa nejm}
traces=$DATA/medqa_traces.jsonl

data medqa_train
files=$(benchmarks $BENCHMARKS)

# the teacher gets the prompt that the student will learn, and 4,096 tokens: SFT would cut the rest
evaluate teacher --model "$TEACHER" --data "$DATA/medqa_train.jsonl" --prompt_style train \
    --samples "$SAMPLES" --temperature 0.6 --top_p 0.95 --think_budget 0
[ "$SMOKE" != 1 ] ||
    show python recipes/smoke_data.py teach "$RUNS/eval/teacher" "$DATA/medqa_train.jsonl"
[ "$NODE_RANK" != 0 ] || [ -f "$traces" ] ||
    show python -m convert from_samples "$RUNS/eval/teacher" --out "$traces"
until [ -f "$traces" ]; do sleep 10; done

sft med_sft --model "$FROM" --data "$traces" --overlong drop
grpo x_reasoner_med --model "$RUNS/med_sft/final" --data "$DATA/medqa_train.jsonl"

start=x_reasoner  # what x_reasoner.sh evaluated, unless it left out one of these benchmarks
for name in $BENCHMARKS; do
    for result in "$RUNS"/eval/x_reasoner_{greedy,avg5}/result.json; do
        [ ! -f "$result" ] || [ ! -f "$DATA/$name.jsonl" ] || grep -q "\"$name\": {" "$result" ||
            start=before_med
    done
done
both_protocols $start "$FROM" - $files
both_protocols x_reasoner_med "$RUNS/x_reasoner_med/final" $start $files
compare x_reasoner=$start x_reasoner_med=x_reasoner_med
