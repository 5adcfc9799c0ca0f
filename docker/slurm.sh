#!/usr/bin/env bash
# One Freshpairs run on the nodes of a Slurm job, each of them a node of a Ray cluster of its own:
#
#   sbatch --nodes=4 docker/slurm.sh CONFIG.yaml RUN_DIR [KEY.PATH=VALUE …]
#
# submitted in a checkout in which `make install` (and `make install-vllm`) ran, on a disk that every
# node sees, as RUN_DIR has to be (or s3://…). Ten minutes before the time limit the run stops at its
# next checkpoint and the job goes back to the queue; started again, it goes on with the run.
#SBATCH --job-name=freshpairs
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=freshpairs-%j.log
set -euo pipefail

# Overridden in the environment of sbatch:
port=${RAY_PORT:-6379}
wait_seconds=${WAIT_SECONDS:-600}
interval=${WAIT_INTERVAL:-2}

if [ $# -lt 2 ]; then
  echo "usage: sbatch docker/slurm.sh CONFIG.yaml RUN_DIR [KEY.PATH=VALUE …]" >&2
  exit 2
fi
cd "$SLURM_SUBMIT_DIR"
PATH=$PWD/.venv/bin:$PATH

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
ip=${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)} # Slurm runs this script on the first node

# Whoever reaches the ports of a Ray cluster without a token may run anything on it.
token=$HOME/.freshpairs-$SLURM_JOB_ID.token
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_ADDRESS=$ip:$port RAY_USAGE_STATS_ENABLED=0
# Workers get thread counts from the run; libraries loaded before are not to wait busily.
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0
unset RAY_AUTH_TOKEN

steps=()
run=
asked=

finish() {
  trap - EXIT USR1 TERM INT
  local pid
  for pid in $run "${steps[@]}"; do kill -TERM "$pid" 2> /dev/null || true; done
  for pid in $run "${steps[@]}"; do wait "$pid" 2> /dev/null || true; done
  rm -f "$token"
}

# shellcheck disable=SC2329 # called by the traps
stop() {
  asked=$1
  echo "$1: the run stops at its next checkpoint" >&2
  if [ -z "$run" ]; then exit 3; fi
  kill -TERM "$run" 2> /dev/null || true
}

trap finish EXIT
trap 'stop "time limit"' USR1
trap 'stop "asked to end"' TERM INT

# Waits where signals are heard, as they are not while a program runs in the foreground.
pause() {
  sleep "$interval" &
  wait $! || true
}

wait_until() { # WHAT COMMAND…: at most wait_seconds, and only while every node is there
  local what=$1 pid
  local end=$((SECONDS + wait_seconds))
  shift
  until "$@"; do
    for pid in "${steps[@]}"; do
      if ! kill -0 "$pid" 2> /dev/null; then
        echo "a node's \`ray start\` ended while waiting for $what: its reason stands above" >&2
        exit 1
      fi
    done
    if [ $SECONDS -ge $end ]; then
      echo "$what: not there after $wait_seconds s (WAIT_SECONDS)" >&2
      exit 1
    fi
    pause
  done
}

# shellcheck disable=SC2329 # called by wait_until
head_is_up() { ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1; }

# shellcheck disable=SC2329 # called by wait_until
nodes_are_up() {
  local alive
  alive=$(ray list nodes --filter state=ALIVE --limit 10000 --format json 2> /dev/null \
    | python -c 'import json, sys; print(len(json.load(sys.stdin)))' 2> /dev/null) || return 1
  [ "$alive" -ge ${#nodes[@]} ]
}

ray_start() { # NODES SRUN_ARGUMENT RAY_ARGUMENT…: one `ray start` on each of so many nodes
  local count=$1 where=$2
  shift 2
  srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 "$where" \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --kill-on-bad-exit=0 --no-kill \
    ray start "$@" --num-cpus="$SLURM_CPUS_ON_NODE" --block &
  steps+=($!)
}

echo "Ray's head on $head ($RAY_ADDRESS), ${#nodes[@]} nodes"
ray_start 1 --nodelist="$head" --head --node-ip-address="$ip" --port="$port" \
  --temp-dir="/tmp/ray-$SLURM_JOB_ID"
wait_until "Ray's head" head_is_up
if [ ${#nodes[@]} -gt 1 ]; then
  ray_start $((${#nodes[@]} - 1)) --exclude="$head" --address="$RAY_ADDRESS"
fi
wait_until "${#nodes[@]} nodes" nodes_are_up

docker/train.sh "$@" &
run=$!
# A signal ends `wait` before the run has ended; bash keeps a child's exit code until it is asked.
while kill -0 "$run" 2> /dev/null; do wait "$run" || true; done
code=0
wait "$run" || code=$?
run=

if [ "$code" = 3 ] && [ "$asked" = "time limit" ]; then
  finish
  echo "back to the queue, to go on with the run"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
