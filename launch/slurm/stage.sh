#!/usr/bin/env bash
# One stage inside a Slurm job: starts it on the job's nodes, has it save in time, requeues the job.
#
#   exec bash launch/slurm/stage.sh VERB OPTIONS...
#
# is how the scripts beside this file end, and those that `dist-train submit` writes; they say what
# they ask Slurm for. What follows is given to `dist_train`; in an array every %a in it becomes the
# task's number. train, embed, index and join get one launcher a node and one process a GPU; a
# task of an array of joins, and every other verb, is one process.
#
# Before the time limit, and when a job of higher priority wants the nodes, the stage saves what it
# has and stops, the job goes back into the queue and continues from there. So it does when a node
# is lost. A job that was cancelled stays so. From the environment:
#
#   GPUS              processes a node             (what Slurm gave the node)
#   MAX_REQUEUES      times it may requeue itself  (20)
#   ACCELERATE_CONFIG launcher's configuration     (accelerate_config.yaml)
#   VENV              where dist_train lives       (.venv; without one, what PATH finds)
#   CONTAINER         words before the command     (apptainer exec --nv image.sif)
#   SRUN_OPTIONS      more options of srun         (--container-image=dist_train.sqsh)

set -uo pipefail # not -e: a signal's trap interrupts `wait`, which then returns non-zero

main() {
    name_things "$@"
    say "job $JOB, restart $RESTARTS, $SLURM_JOB_NODELIST: ${WORDS[*]}"
    stop_requested=
    trap 'stop_requested=1; say "the time limit is near, asking for a stop"' USR1
    trap 'say "asked to end"' TERM # the stage gets its own
    if [[ -n $LAUNCHED ]]; then
        meet
        # What a run before this one said of itself would be taken for this one's word.
        [[ -e $RUN/manifest.json ]] || rm -f "$RUN/status.json"
        start_launched &
    else
        start_alone &
    fi
    watch_over $!
    decide
}

name_things() {
    # A task of an array shares SLURM_JOB_ID with the array: by that, requeue would start them all.
    JOB=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
        JOB=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
    fi
    WORDS=("${@//%a/${SLURM_ARRAY_TASK_ID:-0}}")
    RESTARTS=${SLURM_RESTART_COUNT:-0} # unset, not 0, the first time
    export DIST_TRAIN_JOB=$JOB DIST_TRAIN_ATTEMPT=$RESTARTS # an earlier life must not write after us

    export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
    LAUNCHED=
    case $1 in
    join) if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then LAUNCHED=1; fi ;;
    train | embed | index) LAUNCHED=1 ;;
    esac
    if ((SLURM_NNODES * GPUS == 1)); then LAUNCHED=; fi
    if [[ -z $LAUNCHED ]] && ((SLURM_NNODES > 1)); then
        stop "$1 is one process here, and the job has $SLURM_NNODES nodes; ask for one"
    fi

    export PATH="${VENV:-$PWD/.venv}/bin:$PATH"
    local cpus=${SLURM_CPUS_PER_TASK:-1}
    export SRUN_CPUS_PER_TASK=$cpus # srun does not take it from sbatch
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > GPUS ? cpus / GPUS : 1))}
    # Slurm sends TERM to every process of the step. The launcher would pass it on, and a second
    # TERM ends a worker that is still saving; so the launcher leaves TERM alone.
    export PET_SIGNALS_TO_HANDLE=SIGINT
}

# Where the processes of all nodes find each other, and where they say how they ended.
meet() {
    RUN=$(value_of --out "${WORDS[@]}")
    [[ -n $RUN ]] || stop "say where the result goes: --out FOLDER"
    HEAD=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
    # No falling back on localhost: every node would train a model of its own.
    [[ -n $HEAD ]] || stop "scontrol does not know the first node's address"
    # Another for every job and every restart, below the ports that outgoing connections take; an
    # earlier life may still listen. This shell runs on the first node.
    PORT=$((12000 + (SLURM_JOB_ID * 21 + RESTARTS) % 20000))
    while (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do PORT=$((PORT + 1)); done
    export HEAD PORT CONFIG=${ACCELERATE_CONFIG:-accelerate_config.yaml}
    say "$SLURM_NNODES nodes with $GPUS processes each meet at $HEAD:$PORT"
}

# The quotes are single: the node's number must be read on the node. An ignored signal stays
# ignored in the launcher; the workers install handlers of their own.
start_launched() {
    exec srun ${SRUN_OPTIONS:-} --export=ALL --label --kill-on-bad-exit=1 bash -c '
        trap "" USR1 TERM
        exec ${CONTAINER:-} python -m accelerate.commands.launch --config_file "$CONFIG" \
            --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD" --main_process_port "$PORT" \
            --max_restarts 0 -m dist_train "$@"' launched "${WORDS[@]}"
}

start_alone() {
    exec srun ${SRUN_OPTIONS:-} --export=ALL --ntasks=1 bash -c '
        exec ${CONTAINER:-} python -m dist_train "$@"' alone "${WORDS[@]}"
}

# Wait for the step. Launched processes ignore what comes while they still load their libraries,
# so they are asked again until they hear it. One process by itself ends at once then.
watch_over() {
    local step=$1 asked=
    while kill -0 "$step" 2>/dev/null; do
        if [[ -n $stop_requested && -n $LAUNCHED ]]; then
            if [[ $(status) == running ]]; then scancel --signal=USR1 "$JOB.0" 2>/dev/null; fi
        elif [[ -n $stop_requested && -z $asked ]]; then
            asked=1
            scancel --signal=TERM "$JOB.0"
        fi
        sleep 2 &
        wait $! # a trap ends it early
    done
    wait "$step"
    code=$?
}

decide() {
    local state
    state=$(outcome)
    say "${WORDS[0]} is $state (exit code $code)"
    if [[ $state == failed ]] && ! all_nodes_answer; then
        say "a node is lost"
        state=preempted
    fi
    case $state in
    done) exit 0 ;;
    preempted) requeue ;;
    esac
    exit $((code ? code : 1))
}

# done, preempted or failed. A launcher's exit code cannot tell what was saved from what failed;
# the stage's own status can. One process says 3 itself, or dies of TERM before it listens.
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

# Slurm notices a lost node after minutes; its peers fail at once.
all_nodes_answer() {
    ((SLURM_NNODES == 1)) || timeout 120 srun --overlap --ntasks-per-node=1 true 2>/dev/null
}

requeue() {
    local known
    if ((RESTARTS >= ${MAX_REQUEUES:-20})); then
        say "requeued $RESTARTS times already, giving up; submit again to continue"
        return
    fi
    # A cancelled job must not come back. By now it is no longer running, and not by its time.
    known=$(scontrol --oneliner show job "$JOB")
    if [[ ! $known =~ JobState=RUNNING|Reason=TimeLimit ]]; then
        say "cancelled, or taken away by Slurm; it is not for this script to requeue"
        return
    fi
    # On a node that was cut off, this may be a life that Slurm has replaced.
    if [[ ! $known =~ Restarts=$RESTARTS\  ]]; then
        say "already requeued by Slurm"
        return
    fi
    say "back into the queue"
    scontrol requeue "$JOB" || return
    sleep 120 & # until Slurm takes the job away
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

say() {
    echo "$(date '+%F %T') $*"
}

stop() {
    say "$*" >&2
    exit 1
}

main "$@"
