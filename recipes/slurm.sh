#!/usr/bin/env bash
# One script under Slurm, on one node or several, that survives pre-emption and time limits:
#
#   sbatch recipes/slurm.sh train_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data F --out OUT
#   sbatch --nodes=4 --time=24:00:00 recipes/slurm.sh SCRIPT …            the same on four nodes
#
# --out must be on a file system that all nodes share; the scripts check it. Five minutes before the
# time limit, and when the job is pre-empted, the trainer finishes its step, saves and exits with
# code 75 (torchrun makes that 1; OUT/status says `stopped`); the job is then queued again and
# resumes. A run that fails is not queued again. Adapt partition, account and GPUs to your cluster.
# GPUS=n: processes a node, by default its GPUs. VENV=none: the python on the PATH.
#SBATCH --job-name=x-reasoner
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail
[ $# != 0 ] || { sed -n '2,/^#SBATCH/s/^# \{0,1\}//p' "$0" | sed '$d'; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}"
[ "${VENV:-}" = none ] || . recipes/env.sh requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}} NODES=${SLURM_JOB_NUM_NODES:-1}
export HOST=${HOST:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}  # two jobs may share a node

out=""  # the script's --out, whose status says how it ended
for ((i = 1; i < $#; i++)); do
    [ "${!i}" != --out ] || { next=$((i + 1)); out=${!next}; }
done

# One torchrun a node. It hands the named signals to its processes and waits for them to save.
node='exec torchrun --nproc_per_node="$GPUS" --nnodes="$NODES" --node_rank="$SLURM_NODEID" \
    --master_addr="$HOST" --master_port="$PORT" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 280 "$@"'
srun --kill-on-bad-exit=0 bash -c "$node" torchrun "$@" &
step=$!
trap 'kill -USR1 $step' USR1 TERM  # srun passes USR1 on to the tasks of all nodes
wait $step; code=$?
while kill -0 $step 2>/dev/null; do wait $step; code=$?; done  # the trap ends the first wait
if [ "$code" != 0 ] && [ "$(cat "$out/status" 2>/dev/null)" = stopped ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
