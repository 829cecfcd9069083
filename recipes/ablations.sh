#!/usr/bin/env bash
# The paper's ablations and later variants, one line each, each a row of RUNS/ablations.md.
#
#   bash recipes/ablations.sh                        all of them; machines, flags: x_reasoner.sh
#   ONLY="sft rl_only" bash recipes/ablations.sh     some
#   SMOKE=1 bash recipes/ablations.sh                with tiny weights, on CPU in minutes
#
# Each GRPO row takes STEPS=100 steps (the paper trained about 1,300, to convergence), so compare
# rows with each other and not with the paper's tables. LIMIT=500 questions a benchmark give
# intervals of about ±4 points; LIMIT=0 takes all.
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
STEPS=${STEPS:-100} LIMIT=${LIMIT:-500} ONLY=${ONLY:-}
BENCHMARKS=${BENCHMARKS:-gsm8k mmlu_pro medqa mmmu_pro mathvision}
[ "$SMOKE" = 1 ] || { GRPO_FLAGS+=(--steps "$STEPS"); EVAL_FLAGS+=(--limit "$LIMIT"); }
for name in $ONLY; do
    grep -qE "(ablate|wanted) $name " recipes/ablations.sh && continue
    echo "error: ONLY=$name: no such row in recipes/ablations.sh" >&2
    exit 2
done

data openthoughts
data openthoughts_direct
data orz57k
data medqa_train
files=$(benchmarks $BENCHMARKS)
protocol=(--data $files --samples 5 --temperature 0.3 --think_budget $THINK)
rows=()

wanted() { [ -z "$ONLY" ] || [[ " $ONLY " = *" $1 "* ]]; }

ablate() {  # ablate NAME eval|sft|grpo FROM FLAGS…: train from base, sft or the row FROM (or only
    local name=$1 kind=$2 from=$RUNS/$3/final; shift 3  # evaluate it), and add a row
    wanted "$name" || return 0
    [ "$from" != "$RUNS/base/final" ] || from=$MODEL
    if [ "$from" = "$RUNS/sft/final" ]; then
        sft sft --model "$MODEL" --data "$DATA/openthoughts.jsonl"
    fi
    if [ "$kind" = eval ]; then
        evaluate "ablation/$name" --model "$from" "${protocol[@]}" "$@"
    else
        $kind "ablation/$name" --model "$from" "$@"
        evaluate "ablation/$name" --model "$RUNS/ablation/$name/final" "${protocol[@]}" ${STYLE:-}
    fi
    add_row "$name"
}

add_row() {  # add_row NAME: the table so far goes to RUNS/ablations.md
    rows+=("$RUNS/eval/ablation/$1")
    [ "$NODE_RANK" != 0 ] || python -m scoring.tables "${rows[@]}" | tee "$RUNS/ablations.md"
}

text_solvable() {  # leave out what base or sft solves three times of three without the images
    wanted text_solvable || return 0
    local file name with_images=() solved=$RUNS/text_solvable.txt
    local -A model=([base]=$MODEL [sft]=$RUNS/sft/final)
    for file in $files; do ! grep -q '"images"' "$file" || with_images+=("$file"); done
    sft sft --model "$MODEL" --data "$DATA/openthoughts.jsonl"
    for name in base sft; do
        evaluate "ablation/$name" --model "${model[$name]}" "${protocol[@]}"
        evaluate "ablation/blind_$name" --model "${model[$name]}" --data "${with_images[@]}" \
            --blind --samples 3 --temperature 0.3 --think_budget $THINK
    done
    sort -u "$RUNS"/eval/ablation/blind_{base,sft}/solved.txt > "$solved"
    [ "$SMOKE" != 1 ] || grep -o '"id": "[^"]*' "${with_images[0]}" | head -n 1 |
        cut -d'"' -f4 >> "$solved"
    [ -s "$solved" ] || return 0
    for name in base sft; do  # the stored samples, less those; a --limit brings in as many others
        local left=ablation/${name}_text_solvable_removed
        if [ ! -f "$RUNS/eval/$left/result.json" ] && [ "$NODE_RANK" = 0 ]; then
            show cp -rT "$RUNS/eval/ablation/$name" "$RUNS/eval/$left"
            rm "$RUNS/eval/$left/result.json"
        fi
        evaluate "$left" --model "${model[$name]}" "${protocol[@]}" --drop "$solved"
        add_row "${left#ablation/}"
    done
}

thoughts=$DATA/openthoughts.jsonl math=$DATA/orz57k.jsonl medicine=$DATA/medqa_train.jsonl
# the paper's: which stage, thoughts or not, which domain, forced exit (tables 1 to 4)
ablate base           eval base
ablate sft            eval sft
ablate sft_no_exit    eval sft  --think_budget 0
STYLE="--prompt_style plain" ablate direct sft base --data "$DATA/openthoughts_direct.jsonl"
ablate rl_only        grpo base --data "$math"
ablate rl_medqa       grpo base --data "$medicine"
ablate sft_rl         grpo sft  --data "$math"
ablate sft_rl_medqa   grpo sft  --data "$medicine"
text_solvable
# where the paper contradicts itself or is silent
ablate no_kl          grpo sft  --data "$math" --kl_coef 0
ablate updates_4      grpo sft  --data "$math" --updates 4  # with one the ratio is 1: no clip acts
ablate clip_higher    grpo sft  --data "$math" --updates 4 --clip_high 0.28
ablate sequence_mean  grpo sft  --data "$math" --aggregation seq_mean_token_mean
ablate forced_exit_rl grpo sft  --data "$math" --think_budget $THINK
# what came after it
ablate lora           sft  base --data "$thoughts" --lora_rank 32  # beside sft: LoRA against full
ablate rl_lora        grpo sft  --data "$math" --lora_rank 32      # and beside sft_rl
ablate dr_grpo        grpo sft  --data "$math" --advantage mean_only --aggregation constant \
    --kl_coef 0
ablate dapo           grpo sft  --data "$math" --updates 4 --clip_high 0.28 --kl_coef 0 \
    --zero_variance refill
ablate sft_16k        sft  base --data "$thoughts" --max_len 16384 --pack_len 16384
ablate sft_16k_rl     grpo ablation/sft_16k --data "$math"
