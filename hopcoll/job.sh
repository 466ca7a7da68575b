# shellcheck shell=bash
# What all batch scripts for Slurm share. A script sets what it wants to be otherwise, sources this,
# and calls `hopcoll_job PROGRAM ARGUMENT...`, which comes back when the program ended well:
#
#   hopcoll run in the allocation -- 0 ---------------------> back to the script
#      | \
#      |  +-- USR1: commit and stop (75) -> requeue at once
#      +----- it failed, or nodes are lost: requeue after a while; not for ever

# The most ranks that there are; what the allocation has beyond them is spare. None: all of it.
: "${hopcoll_ranks:=}"
# With fewer ranks the job does not go on: it waits for nodes in the queue.
: "${hopcoll_min_ranks:=1}"
# How often it is started again in its allocation, when a node or mpirun is lost.
: "${hopcoll_restarts:=5}"
# How often it may fail, or stop, without a newer commit, and how often it may be requeued at all.
: "${hopcoll_failures:=5}"
: "${hopcoll_requeues:=100}"
# Seconds in the queue after a first failure; they double with each further one, up to an hour.
: "${hopcoll_backoff_s:=60}"
# Seconds for a commit after USR1: fewer than the script's --signal leaves.
: "${hopcoll_stop_within_s:=90}"
# Seconds between two looks whether the node of the batch script lives.
: "${hopcoll_watch_s:=60}"
# Seconds before Slurm is asked again when its controller is away; they double, up to five minutes.
# And how long it may be away before the job is given up.
: "${hopcoll_away_s:=5}"
: "${hopcoll_away_max_s:=3600}"

# The tasks of an array have one number together, and that of one of them alone means all of them.
hopcoll_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
hopcoll_id=${hopcoll_id:-$SLURM_JOB_ID}

hopcoll_say() {
    echo "hopcoll job $hopcoll_id: $*" >&2
}

# Before all that takes time: a signal without its trap would end the script for good.
hopcoll_asked='' hopcoll_ended='' hopcoll_signalled='' hopcoll_pid=''
hopcoll_pass_on() {
    hopcoll_say "SIG$1"
    hopcoll_signalled=yes
    [ -z "$hopcoll_pid" ] || kill "-$1" "$hopcoll_pid" || :
}
trap 'hopcoll_asked=yes; hopcoll_pass_on USR1' USR1
trap 'hopcoll_ended=yes; hopcoll_pass_on TERM' TERM

# What was submitted inside another job may have inherited that one's array and its count of starts.
if [ "$hopcoll_id" != "$SLURM_JOB_ID" ] || [ -n "${SLURM_RESTART_COUNT:-}" ]; then
    hopcoll_told=$(timeout 60 scontrol -o show job "$hopcoll_id") || hopcoll_told=''
    if [ -n "$hopcoll_told" ] && [[ $hopcoll_told != "JobId=$SLURM_JOB_ID "* ]]; then
        hopcoll_id=$SLURM_JOB_ID
        unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
        hopcoll_told=$(timeout 60 scontrol -o show job "$hopcoll_id") || hopcoll_told=''
    fi
    # Slurm never counts down. Where it tells more, this is an older start, which must not seem new.
    if [[ $hopcoll_told =~ ' Restarts='([0-9]+)' ' ]] &&
        [ "${BASH_REMATCH[1]}" -lt "${SLURM_RESTART_COUNT:-0}" ]; then
        export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}
    fi
fi
# The same for each start of the job, and on a file system that all nodes share.
hopcoll_folder=$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$hopcoll_id
hopcoll_start=${SLURM_RESTART_COUNT:-0}

cd "$SLURM_SUBMIT_DIR" && mkdir -p "$hopcoll_folder" || exit
: "${hopcoll_environment:=$SLURM_SUBMIT_DIR/.venv}"
PATH=$hopcoll_environment/bin:$PATH
# A process of an older start, on a node that Slurm does not reach, tells into a file of its own.
export HOPCOLL_PROGRESS_FILE=$hopcoll_folder/progress.$hopcoll_start
# For srun: a dead node takes no step with it, and a step waits for no other (--no-kill does not say
# it; an empty value or "1" would be an error).
export SLURM_NO_KILL=set SLURM_OVERLAP=1
# After `sbatch --export=NONE` srun would give the watchers none of these variables.
export SLURM_EXPORT_ENV=ALL

# Whatever requeued it: preemption, a node, an administrator.
if [ "$hopcoll_start" -gt "$hopcoll_requeues" ]; then
    hopcoll_say "requeued $hopcoll_start times, and $hopcoll_requeues is the most"
    exit 1
fi

hopcoll_begun='' hopcoll_step='' hopcoll_call=0
hopcoll_job() {
    local code begin_s=$SECONDS
    hopcoll_call=$((hopcoll_call + 1))
    if [ -z "$hopcoll_begun" ] && ! hopcoll_begin; then
        # It has run before: a node may have lost its file system, and another start finds others.
        [ "$hopcoll_start" -eq 0 ] || hopcoll_requeue 1 || :
        exit 1
    fi
    if [ -n "$hopcoll_asked$hopcoll_ended" ]; then # while nothing ran
        hopcoll_requeue 75 || :
        exit 75
    fi

    # In the background, because bash answers a signal at once only while it waits.
    hopcoll run ${hopcoll_ranks:+--ranks "$hopcoll_ranks"} --min-ranks "$hopcoll_min_ranks" \
        --restarts "$hopcoll_restarts" --stop-within "$hopcoll_stop_within_s" "$@" &
    hopcoll_pid=$!
    # What came before there was anybody to tell.
    [ -z "$hopcoll_asked" ] || kill -USR1 "$hopcoll_pid" || :
    [ -z "$hopcoll_ended" ] || kill -TERM "$hopcoll_pid" || :
    # A signal ends a wait before the program has ended: its own code comes from the next one.
    hopcoll_signalled=yes
    while [ -n "$hopcoll_signalled" ]; do
        hopcoll_signalled=''
        code=0
        wait "$hopcoll_pid" || code=$? # the script may have said `set -e`
    done
    hopcoll_pid=''
    if [ $code -eq 0 ]; then
        rm -f "$hopcoll_folder/failures.$hopcoll_call"
        return 0
    fi
    hopcoll_requeue $code $((SECONDS - begin_s)) || :
    exit $code
}

hopcoll_begin() {
    hopcoll_step=$(hopcoll_durable)
    hopcoll_seen || return
    # `hopcoll slurm status` finds the folder by it.
    timeout 20 scontrol update "JobId=$hopcoll_id" "Comment=hopcoll $hopcoll_folder"
    hopcoll_watch
    hopcoll_begun=yes
}

# Whether all nodes see the environment. Without it the job would fail on each node by itself, again
# and again.
hopcoll_seen() {
    local program blind nodes=$SLURM_JOB_NUM_NODES
    if ! program=$(command -v hopcoll); then
        hopcoll_say "$SLURMD_NODENAME finds no hopcoll, neither in $hopcoll_environment nor on PATH"
        return 1
    fi
    # A node that dies meanwhile says nothing, and is no reason to end. What a site's own scripts
    # print has no mark.
    # shellcheck disable=SC2016 # the node's own name
    blind=$(timeout 120 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        sh -c '"$0" --version >/dev/null 2>&1 || echo "blind:$SLURMD_NODENAME"' "$program")
    blind=$(sed -n 's/^blind://p' <<<"$blind")
    [ -n "$blind" ] || return 0
    hopcoll_say "${blind//$'\n'/, } cannot run $program: it has to be on a shared file system"
    return 1
}

# What the newest start that told anything told last. Numbers of different programs, such as one that
# trains and then a workflow, cannot be compared: what is another one is progress.
hopcoll_durable() {
    local start step=''
    for ((start = hopcoll_start; start >= 0; start--)); do
        { read -r step || :; } 2>/dev/null <"$hopcoll_folder/progress.$start" || continue
        [ -z "$step" ] || break
    done
    echo "$step"
}

# A controller that answers refuses for good, but may have been away a moment ago.
hopcoll_away_until='' hopcoll_tries=0
hopcoll_again() {
    : "${hopcoll_away_until:=$((SECONDS + hopcoll_away_max_s))}"
    if [[ $(timeout 60 scontrol ping 2>/dev/null) == *" is UP"* ]]; then
        hopcoll_tries=$((hopcoll_tries + 1))
        [ "$hopcoll_tries" -lt 5 ] || return
    fi
    [ "$SECONDS" -lt "$hopcoll_away_until" ] || return
    sleep "$hopcoll_away_s"
    hopcoll_away_s=$((hopcoll_away_s < 150 ? 2 * hopcoll_away_s : 300))
}

# Whether Slurm has this start for the one that runs.
hopcoll_runs() {
    local job=''
    until job=$(timeout 60 scontrol -o show job "$hopcoll_id"); do
        hopcoll_again || break
    done
    # A script that lives on, on a node that was out of reach, must not end its successor.
    if [[ $job != *" Restarts=$hopcoll_start "* ]]; then
        hopcoll_say "ended with $1, and a newer start of it runs, or Slurm does not answer"
        return 1
    fi
    if [[ $job != *" JobState=RUNNING "* ]]; then # a requeue would bring back what was cancelled
        hopcoll_say "ended with $1, and Slurm has ended the job"
        return 1
    fi
}

# After this code, and so many seconds.
hopcoll_requeue() {
    trap '' USR1 TERM # Slurm's TERM for this very requeue comes before the time is told
    local code=$1 lasted_s=${2:-} wait_s=0 failures=0 step='' before=''
    local file=$hopcoll_folder/failures.$hopcoll_call
    # TERM comes from Slurm, which then knows what is to become of the job, or from a node that is
    # shut down, and then the job runs.
    [ -z "$hopcoll_ended" ] || sleep 2
    hopcoll_runs "$code" || return
    if [ "$hopcoll_start" -ge "$hopcoll_requeues" ]; then
        hopcoll_say "ended with $code; it was requeued $hopcoll_start times, which is the most"
        return
    fi
    step=$(hopcoll_durable)
    # By convention; another start would have the same arguments.
    if [ "$code" -eq 2 ] && [ "$hopcoll_start" -eq 0 ] && [ -z "$step" ] &&
        [ "${lasted_s:-300}" -lt 300 ]; then
        hopcoll_say "ended with 2 at once: it was called wrongly"
        return
    fi
    if [ -n "$hopcoll_asked" ] && [ -z "$step" ]; then
        wait_s=$hopcoll_backoff_s # a program that tells no steps may have got on
    # Who was asked to stop, and committed something, goes on at once.
    elif [ -z "$hopcoll_asked" ] || [ "$step" = "$hopcoll_step" ]; then
        read -r failures before 2>/dev/null <"$file" || :
        [ "$before" = "$step" ] || failures=0
        failures=$((failures + 1))
        if [ "$failures" -ge "$hopcoll_failures" ]; then
            hopcoll_say "failed $failures times since step ${step:-0}, the last time with $code"
            return
        fi
        # What cannot be counted must not go on.
        echo "$failures $step" >"$file" || return
        wait_s=$((hopcoll_backoff_s << (failures > 7 ? 6 : failures - 1)))
        [ "$wait_s" -le 3600 ] || wait_s=3600
    fi
    hopcoll_say "ended with $code; requeued, for $wait_s s at least"
    # It may have been done, though nobody said so: each try is for this start alone.
    until timeout 60 scontrol requeue "$hopcoll_id"; do
        hopcoll_again && hopcoll_runs "$code" || return
    done
    # The requeue ends the script as well, but not before it has said when to start.
    hopcoll_tries=0
    until [ "$wait_s" -eq 0 ] ||
        timeout 60 scontrol update "JobId=$hopcoll_id" "StartTime=now+$wait_s"; do
        hopcoll_again || { hopcoll_say "that it is to wait Slurm did not take" && return; }
    done
}

# --no-kill leaves a job without its first node running, with nobody there. So others look after it.
hopcoll_watch() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "$hopcoll_first" |
        head -n 3); do
        srun --nodes=1 --ntasks=1 --nodelist="$node" --output=/dev/null --input=none \
            bash -c "$(declare -f hopcoll_watcher); hopcoll_watcher" >/dev/null 2>&1 &
    done
}

# On another node: requeue the job when Slurm has taken its first node away.
hopcoll_watcher() {
    local job
    trap '' HUP PIPE # the srun that started it is gone then
    while sleep "$hopcoll_watch_s"; do
        job=$(timeout 60 scontrol -o show job "$hopcoll_id") || continue
        [[ $job == *" Restarts=$hopcoll_start "* ]] || return
        [[ $job == *" JobState=RUNNING "* && $job =~ ' 'NodeList=([^ ]+) ]] || continue
        scontrol show hostnames "${BASH_REMATCH[1]}" | grep -qxF "$hopcoll_first" && continue
        echo "hopcoll job $hopcoll_id: lost its first node, $hopcoll_first; requeued" \
            >>"$hopcoll_folder/watchers.log"
        scontrol requeue "$hopcoll_id" && return
    done
}
hopcoll_first=$SLURMD_NODENAME
export hopcoll_id hopcoll_first hopcoll_start hopcoll_folder hopcoll_watch_s HOPCOLL_JOB_FOLDER=$hopcoll_folder
