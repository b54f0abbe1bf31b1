#!/bin/bash
# One task of a job: runs a command, and leaves a file behind if SLURM asks it to stop meanwhile.
#   task.sh FILE COMMAND...
# SIGTERM and SIGUSR1 reach every process of a task: this shell makes the file when the program has saved and ended.
# Ends with 0 then, and else with the command's status: srun's is the highest of all tasks, so 0 means that none failed
# by itself.
set -euo pipefail
file=$1 asked='' status=0
shift
trap 'asked=1' TERM USR1
"$@" || status=$?
if [ -n "$asked" ]; then
    : >"$file"
    status=0
fi
exit "$status"
