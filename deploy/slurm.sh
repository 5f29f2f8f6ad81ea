#!/bin/bash
# A job, or several, on a Ray cluster within a Slurm allocation: sbatch deploy/slurm.sh job.yaml [more.yaml ...]
#
# The first node has the driver and trains, the last one measures and does nothing else, those between train. paretune is
# installed in $PARETUNE_ENV (a virtual environment), and the jobs lie on a file system that all nodes share.
#
#SBATCH --job-name=paretune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
# Whole nodes: a neighbour's job is noise in the latencies.
#SBATCH --exclusive
#SBATCH --time=24:00:00
# For trials on GPUs: ##SBATCH --gpus-per-node=4, and ray.resources.gpu in the job.
# Preempted, or on a node that fails: begin again, and --resume goes on. The log grows on.
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up, this script gets SIGTERM.
#SBATCH --signal=B:TERM@120

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch slurm.sh job.yaml [more.yaml ...]" >&2
    exit 2
fi
if ((SLURM_JOB_NUM_NODES < 2)); then
    echo "slurm.sh must have 2 nodes or more, one of them to measure on; use sbatch --nodes=2" >&2
    exit 2
fi
if [[ -n ${PARETUNE_ENV:-} ]]; then
    # shellcheck disable=SC1091
    source "$PARETUNE_ENV/bin/activate"
fi

# Others on the network must not be able to run programs as you; srun hands these on to all nodes.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

driver=
stopped=
trap 'stopped=1; [[ -z $driver ]] || kill -TERM "$driver" 2>/dev/null || true' TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
gauge=${nodes[-1]}
trainers=("${nodes[@]:1:${#nodes[@]}-2}")
# Jobs of other users may have a Ray of their own on a node that isn't exclusive.
port=$((20000 + SLURM_JOB_ID % 10000))
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port

# One `ray start` a node, as a step of its own that ends with it; unbound, or it would have the cores of a single task.
start() { # node, arguments of ray start
    srun --nodes=1 --ntasks=1 --overlap --cpu-bind=none --nodelist="$1" ray start --block "${@:2}" &
}

# One core of the first node is left to the driver.
start "$head" --head --port="$port" --num-cpus=$((SLURM_CPUS_ON_NODE > 1 ? SLURM_CPUS_ON_NODE - 1 : 1))
for ((tries = 0; ; tries++)); do
    if ray status --address="$address" >/dev/null 2>&1; then break; fi
    if ((tries == 30)); then
        echo "slurm.sh must reach Ray on $head, but got no answer at $address; see the lines above" >&2
        exit 1
    fi
    sleep 2
done
for node in "${trainers[@]}"; do
    start "$node" --address="$address"
done
start "$gauge" --address="$address" --num-cpus=0 --resources='{"measure": 1}'

code=143
if [[ -z $stopped ]]; then
    # In the background: bash handles a signal only when what runs in the foreground has ended.
    paretune run "$@" --resume -o search.executor=ray -o ray.address="$address" -o ray.measure=measure &
    driver=$!
    while # again where a signal ended the wait, and not the driver, which still writes its files
        code=0
        wait "$driver" || code=$?
        kill -0 "$driver" 2>/dev/null
    do :; done
fi

if [[ -n $stopped ]]; then
    # The time is up. A preempted job is requeued by Slurm itself, and this then changes nothing.
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
