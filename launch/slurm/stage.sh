#!/usr/bin/env bash
# One stage inside a Slurm job: starts it on the nodes, makes it save in time, requeues the job.
#
#   exec bash launch/slurm/stage.sh VERB OPTIONS...
#
# is the last line of the scripts beside this file, and of those that `dist-train submit` writes.
# They give sbatch the resources; the arguments go to `dist_train`, and in an array every %a in them
# becomes the task's number. train, embed, index and join get one launcher on each node and one
# process for each GPU; a task of an array of joins, and every other verb, is one process.
#
# Before the time limit, and when a job of higher priority needs the nodes, the stage saves its work
# and stops; the job is requeued and resumes from there. The same happens when a node is lost. A job
# that was cancelled is not requeued. Environment variables, with their defaults or an example:
#
#   GPUS              processes on each node        (the GPUs that Slurm gave the node)
#   MAX_REQUEUES      times it may requeue itself   (20)
#   ACCELERATE_CONFIG configuration of the launcher (accelerate_config.yaml)
#   VENV              environment with dist_train   (.venv; without one, what PATH finds)
#   CONTAINER         command that starts processes (apptainer exec --nv image.sif)
#   SRUN_OPTIONS      further options of srun       (--container-image=dist_train.sqsh)

set -uo pipefail # not -e: a signal's trap interrupts `wait`, which then returns non-zero

main() {
    read_environment "$@"
    log "job $JOB, restart $RESTARTS, $SLURM_JOB_NODELIST: ${ARGUMENTS[*]}"
    stop_requested=
    trap 'stop_requested=1; log "the time limit is near, requesting a stop"' USR1
    trap 'log "received SIGTERM"' TERM # Slurm sends it to the stage as well
    if [[ -n $LAUNCHED ]]; then
        choose_address
        # A status left by an earlier attempt would be taken for that of this one.
        [[ -e $RUN/manifest.json ]] || rm -f "$RUN/status.json"
        start_launched &
    else
        start_alone &
    fi
    wait_for_step $!
    end_job
}

read_environment() {
    # A task of an array shares SLURM_JOB_ID with the array: requeue by it would restart all tasks.
    JOB=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    fi
    ARGUMENTS=("${@//%a/${SLURM_ARRAY_TASK_ID:-0}}")
    RESTARTS=${SLURM_RESTART_COUNT:-0} # unset, not 0, the first time
    # By these an earlier attempt that still runs notices that it must not write any more.
    export DIST_TRAIN_JOB=$JOB DIST_TRAIN_RESTART=$RESTARTS

    export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
    LAUNCHED=
    case $1 in
    join) if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then LAUNCHED=1; fi ;;
    train | embed | index) LAUNCHED=1 ;;
    esac
    if ((SLURM_NNODES * GPUS == 1)); then LAUNCHED=; fi
    if [[ -z $LAUNCHED ]] && ((SLURM_NNODES > 1)); then
        fail "$1 runs as one process here, but the job has $SLURM_NNODES nodes; request one node"
    fi

    export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    export SRUN_CPUS_PER_TASK=$cpus # srun does not inherit it from sbatch
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > GPUS ? cpus / GPUS : 1))}
    # Slurm sends TERM to every process of the step. If the launcher passed it on, its workers would
    # get a second TERM, which ends a worker that is still saving; so the launcher ignores TERM.
    export PET_SIGNALS_TO_HANDLE=SIGINT
}

# The address and port where the processes of all nodes connect, and the folder of their status.
choose_address() {
    RUN=$(value_of --out "${ARGUMENTS[@]}")
    [[ -n $RUN ]] || fail "no folder for the result: give --out FOLDER"
    HEAD=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
    # Do not fall back to localhost: every node would train its own model.
    [[ -n $HEAD ]] || fail "scontrol does not know the first node's address"
    # A different port for every job and restart, as an earlier attempt may still listen, and below
    # the ports of outgoing connections. This shell runs on the first node.
    PORT=$((12000 + (SLURM_JOB_ID * 21 + RESTARTS) % 20000))
    while (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do PORT=$((PORT + 1)); done
    export HEAD PORT CONFIG=${ACCELERATE_CONFIG:-accelerate_config.yaml}
    log "$SLURM_NNODES nodes with $GPUS processes each connect at $HEAD:$PORT"
}

# The quotes are single, as the node's number must be read on the node. A signal ignored here stays
# ignored in the launcher; the workers install their own handlers.
start_launched() {
    exec srun ${SRUN_OPTIONS:-} --export=ALL --label --kill-on-bad-exit=1 bash -c '
        trap "" USR1 TERM
        exec ${CONTAINER:-} python -m accelerate.commands.launch --config_file "$CONFIG" \
            --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT" \
            --max_restarts 0 -m dist_train "$@"' launched "${ARGUMENTS[@]}"
}

start_alone() {
    exec srun ${SRUN_OPTIONS:-} --export=ALL --ntasks=1 bash -c '
        exec ${CONTAINER:-} python -m dist_train "$@"' alone "${ARGUMENTS[@]}"
}

# Wait for the step. Launched processes ignore signals while they load their libraries, so the
# request is repeated as long as they run. A single process ends at once in that case.
wait_for_step() {
    local step=$1 signalled=
    while kill -0 "$step" 2>/dev/null; do
        if [[ -n $stop_requested && -n $LAUNCHED ]]; then
            if [[ $(status) == running ]]; then scancel --signal=USR1 "$JOB.0" 2>/dev/null; fi
        elif [[ -n $stop_requested && -z $signalled ]]; then
            signalled=1
            scancel --signal=TERM "$JOB.0"
        fi
        sleep 2 &
        wait $! # a signal interrupts it
    done
    wait "$step"
    code=$?
}

# Exit with the outcome, or requeue the job.
end_job() {
    local state
    state=$(outcome)
    log "${ARGUMENTS[0]} is $state (exit code $code)"
    if [[ $state == failed ]] && ! all_nodes_answer; then
        log "a node is lost"
        state=preempted
    fi
    case $state in
    done) exit 0 ;;
    preempted) requeue ;;
    esac
    exit $((code ? code : 1))
}

# done, preempted or failed. A launcher's exit code does not distinguish a saved stage from a failed
# one; the stage's status.json does. A single process exits with 3, or is killed by TERM while it
# still loads its libraries.
outcome() {
    local state=failed
    if [[ -n $LAUNCHED ]]; then
        state=$(status)
    else
        case $code in
        0) state=done ;;
        3 | 143) state=preempted ;;
        esac
    fi
    case $state in
    done | preempted) echo "$state" ;;
    *) echo failed ;;
    esac
}

# Slurm notices a lost node only after minutes, while the processes on other nodes fail at once.
all_nodes_answer() {
    ((SLURM_NNODES == 1)) || timeout 120 srun --overlap --ntasks-per-node=1 true 2>/dev/null
}

requeue() {
    local known
    if ((RESTARTS >= ${MAX_REQUEUES:-20})); then
        log "requeued $RESTARTS times already, giving up; submit again to continue"
        return
    fi
    # A cancelled job must not be requeued. It is no longer running, but not because of its time.
    known=$(scontrol --oneliner show job "$JOB")
    if [[ ! $known =~ JobState=RUNNING|Reason=TimeLimit ]]; then
        log "cancelled or removed by Slurm, so it is not requeued"
        return
    fi
    # On a node that was cut off, Slurm may have replaced this attempt already.
    if [[ ! $known =~ Restarts=$RESTARTS\  ]]; then
        log "already requeued by Slurm"
        return
    fi
    log "requeueing the job"
    scontrol requeue "$JOB" || return
    sleep 120 & # until Slurm ends this job
    wait $!
}

status() {
    sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' "$RUN/status.json" 2>/dev/null
}

# The value of an option, as `--option value` or `--option=value`.
value_of() {
    local option=$1
    shift
    while (($#)); do
        case $1 in
        "$option") echo "${2:-}" && return ;;
        "$option"=*) echo "${1#*=}" && return ;;
        esac
        shift
    done
}

address_of() {
    scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

log() {
    echo "$(date '+%F %T') $*"
}

fail() {
    log "$*" >&2
    exit 1
}

main "$@"
