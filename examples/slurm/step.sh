# shellcheck shell=bash
# Sourced by the scripts of this folder, which are submitted from the root of the repository.
#
#   step COMMAND...   runs COMMAND on every task of the job; if SLURM asked it to stop, the job goes back into the queue
#
# SLURM requeues a preempted job only if it is still there at the end of its grace time. One that saves and ends before
# has completed, as far as SLURM knows: so it puts itself back. The next start goes on from the checkpoint.
# After a plain scancel it does not: that ends the script itself, too.

step() {
    local asked=.asked-to-stop-$SLURM_JOB_ID status=0
    rm -f "$asked"
    srun --kill-on-bad-exit=1 bash examples/slurm/task.sh "$asked" "$@" || status=$?
    if [ "$status" -eq 0 ] && [ -e "$asked" ]; then
        echo "job $SLURM_JOB_ID was asked to stop: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    rm -f "$asked"
    return "$status"
}
