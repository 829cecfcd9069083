# Sourced by the recipes: where things are, and one function for each kind of step. A step that is
# done is skipped, so a recipe that was stopped resumes when you rerun the same command.
#
#   NPROC=8        GPUs of this node
#   MODEL=…        the model to start from (hub id or directory)
#   RUNS=runs      runs and evaluations; DATA=data: converted jsonl; RAW=data/raw: the releases
#   LORA=32        train adapters of this rank: a 7B on one GPU (docs/memory.md)
#   SFT= RL= EVAL= flags added to every train_sft.py, train_grpo.py, eval.py
#   NNODES=2 NODE_RANK=0|1 MASTER=host:29500         the same command on each node, on a shared disk
#   SMOKE=1        tiny weights (of MODEL's architecture) and a few made-up rows, on CPU in minutes
#   VENV=none      use the python on the PATH; else .venv is made and filled on first use
set -euo pipefail
if [ $# != 0 ]; then  # a recipe takes no arguments: --help prints its head and starts nothing
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    [ "$1" = --help ] || [ "$1" = -h ] || { echo "unknown argument $1" >&2; exit 2; }
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}  # less fragmentation
[ "${VENV:-}" = none ] || . recipes/env.sh requirements.txt
SMOKE=${SMOKE:-0} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}
if [ "$SMOKE" = 1 ]; then
    NPROC=${NPROC:-1} RUNS=${RUNS:-runs/smoke} WANTED=${MODEL:-}
    RAW=$RUNS/raw DATA=$RUNS/data MODEL=$RUNS/base TEACHER=$RUNS/base NEJM=$RUNS/releases/nejm
    THINK=24 STEPS=2
    SFT_FLAGS=(--device cpu --max_len 768 --pack_len 1024 --batch_tokens 2048 --epochs 1
               --checkpointing none)
    GRPO_FLAGS=(--device cpu --steps $STEPS --prompts 4 --group 2 --max_new_tokens 48 --slots 4
                --graders 1)
    EVAL_FLAGS=(--device cpu --limit 2 --max_new_tokens 48 --answer_budget 12 --min_pixels 0
                --max_pixels 0 --slots 32 --graders 1)
    [ "$NODE_RANK" != 0 ] || [ -d "$MODEL" ] ||
        python recipes/smoke_data.py write "$RUNS" "$WANTED"
    until [ -d "$MODEL" ]; do sleep 1; done
else
    NPROC=${NPROC:-8} RUNS=${RUNS:-runs} RAW=${RAW:-data/raw} DATA=${DATA:-data}
    MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
    THINK=3800  # forced exit here leaves room for the answer within the paper's 4,096 tokens
    SFT_FLAGS=() GRPO_FLAGS=() EVAL_FLAGS=()
fi

LORA_FLAGS=()
[ -z "${LORA:-}" ] || LORA_FLAGS=(--lora_rank "$LORA")

show() { echo "+ $*"; "$@"; }

launch() {  # launch SCRIPT FLAGS…: one process a GPU, on all nodes
    if [ "$NNODES" != 1 ]; then
        show torchrun --nproc_per_node="$NPROC" --nnodes="$NNODES" --node_rank="$NODE_RANK" \
            --rdzv_backend=c10d --rdzv_endpoint="$MASTER" "$@"
    elif [ "$NPROC" != 1 ]; then
        show torchrun --standalone --nproc_per_node="$NPROC" "$@"
    else
        show python "$@"
    fi
}

converted() {  # converted FILE: is it there? Only the first node makes it, the others wait for it
    if [ "$NODE_RANK" != 0 ]; then until [ -f "$1.info.json" ]; do sleep 10; done; fi
    [ -f "$1.info.json" ]  # written last
}

data() {  # data NAME FLAGS…: DATA/NAME.jsonl from the published release
    local name=$1 release=$1 raw out=$DATA/$1.jsonl; shift
    ! converted "$out" || return 0
    case $name in openthoughts_direct | medqa_train | geometry3k_test) release=${name%_*} ;; esac
    raw=$RAW/$release
    if [ "$name" = nejm ]; then
        raw=$NEJM  # copyrighted: the user's own files
    elif [ ! -f "$raw/download.json" ]; then  # written last
        mkdir -p "$RAW"
        if [ "$SMOKE" = 1 ]; then show cp -r "$RUNS/releases/$release" "$RAW"
        else show python -m convert download "$release" --out "$raw"; fi
    fi
    show python -m convert "$name" "$raw" --out "$out" "$@"
}

pick() {  # pick FROM NAME FLAGS…: DATA/NAME.jsonl, the rows of DATA/FROM.jsonl that FLAGS select
    local from=$1 out=$DATA/$2.jsonl; shift 2
    converted "$out" || show python -m convert select "$DATA/$from.jsonl" --out "$out" "$@"
}

trained() { [ "$(cat "$RUNS/$1/status" 2>/dev/null)" = finished ]; }

sft() {  # sft NAME FLAGS…: train_sft.py into RUNS/NAME
    local name=$1; shift
    trained "$name" || launch train_sft.py --out "$RUNS/$name" \
        "${SFT_FLAGS[@]}" "${LORA_FLAGS[@]}" "$@" ${SFT:-}
}

grpo() {  # grpo NAME FLAGS…: train_grpo.py into RUNS/NAME
    local name=$1; shift
    trained "$name" || launch train_grpo.py --out "$RUNS/$name" \
        "${GRPO_FLAGS[@]}" "${LORA_FLAGS[@]}" "$@" ${RL:-}
}

evaluate() {  # evaluate NAME FLAGS…: eval.py into RUNS/eval/NAME
    local name=$1; shift
    [ -f "$RUNS/eval/$name/result.json" ] ||
        launch eval.py --out "$RUNS/eval/$name" "${EVAL_FLAGS[@]}" "$@" ${EVAL:-}
}

both_protocols() {  # both_protocols NAME MODEL OTHER|- FILES…: greedy, and 5 samples at 0.3
    local name=$1 model=$2 other=$3 against=(); shift 3
    local flags=(--model "$model" --data "$@" --think_budget $THINK)
    [ "$other" = - ] || against=(--compare "$RUNS/eval/${other}_greedy")
    evaluate "${name}_greedy" "${flags[@]}" "${against[@]}"
    [ "$other" = - ] || against=(--compare "$RUNS/eval/${other}_avg5")
    evaluate "${name}_avg5" "${flags[@]}" --samples 5 --temperature 0.3 "${against[@]}"
}

compare() {  # compare PAPER_NAME=EVALUATION…: beside the paper's tables, under both protocols
    [ "$NODE_RANK" = 0 ] || return 0
    local protocol pair runs
    for protocol in greedy avg5; do
        runs=()
        for pair in "$@"; do runs+=("${pair%%=*}=$RUNS/eval/${pair#*=}_$protocol"); done
        show python results/compare.py "${runs[@]}"
    done
}

benchmarks() {  # benchmarks NAME…: make each and print its file; NEJM only if the user has it
    local name limit
    for name in "$@"; do
        if [ "$name" = nejm ] && [ -z "${NEJM:-}" ]; then
            echo "= no NEJM: set NEJM=folder with its json and images" >&2
            continue
        fi
        limit=()
        [ "$name" != omnimedvqa ] || limit=(--limit 1000)  # the paper's 1,000 are not published
        data "$name" "${limit[@]}" >&2
        echo "$DATA/$name.jsonl"
    done
}
