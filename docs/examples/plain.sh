#!/bin/bash
# counterflow VERSION, DATE, in /shared/home:
#   counterflow launch slurm --nodes 16 --gpus-per-node 8 --partition h100 --account research --time 24:00:00 --exclusive --interface ib0 --setup 'module load cuda/12.8' -- train v3.toml
#SBATCH --job-name=v3
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --partition=h100
#SBATCH --account=research
#SBATCH --signal=USR1@120
#SBATCH --exclusive
#SBATCH --output=/shared/runs/v3/slurm/job-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT
# As given with --setup:
module load cuda/12.8

name=v3
run=/shared/runs/v3
config=/shared/runs/v3/slurm/train-0123456789ab.toml
max_requeues=10

start() {
  exec srun --nodes=16 --ntasks=16 --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=300 \
    --cpu-bind=none --export=ALL /shared/venv/bin/python -m counterflow node \
    --ranks-per-node=8 --interface=ib0 --folder="$folder" -- train "$config"
}

# What --setup may have set would end this script before it can queue the job again.
set -u +efC +o pipefail
say() { printf 'counterflow: %s\n' "$*"; }

case ${SLURM_JOB_ID:-} in
  '' | *[!0-9]*) say "this is a script for sbatch; SLURM_JOB_ID is not set" >&2; exit 2 ;;
esac
case ${SLURM_RESTART_COUNT:=0} in *[!0-9]*) SLURM_RESTART_COUNT=0 ;; esac
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
folder=$run/slurm/$SLURM_JOB_ID/start-$SLURM_RESTART_COUNT
export COUNTERFLOW_BAD_NODES=$folder/bad_nodes
counted=$run/slurm/$SLURM_JOB_ID/requeues

# Numbers of jobs come again: what an older job of this one left is not ours.
if ! { rm -rf -- "$folder" && mkdir -p -- "$folder/status"; }; then
  say "job $job on ${SLURMD_NODENAME:-?}: $folder cannot be made; choose another run.folder, one" \
    "that all nodes can write to"
  exit 2
fi
if (( SLURM_RESTART_COUNT == 0 )); then rm -f -- "$counted"; fi
say "job $job, start $SLURM_RESTART_COUNT, run $name on $SLURM_JOB_NODELIST"

# scontrol is missing in most containers, so what it knows is left for the step on file.
if command -v scontrol >/dev/null; then
  scontrol show topology >"$folder/topology" 2>/dev/null || rm -f -- "$folder/topology"
else
  say "scontrol is not on ${SLURMD_NODENAME:-this node}: nodes go by their names, not by the" \
    "network's topology, and the job cannot queue itself again; install Slurm's commands there"
fi

# Finished checkpoints as they are now: one that is written anew differs by its time.
saved() {
  local path
  for path in "$run"/checkpoints/step-*; do
    if [[ -d $path ]]; then echo "${path##*/} $(stat -c '%i %Y' -- "$path")"; fi
  done
}

# Whether there is one that was not there when this start began.
saved_now() {
  local line
  while IFS= read -r line; do
    case $'\n'$saved_before$'\n' in *$'\n'"$line"$'\n'*) ;; *) return 0 ;; esac
  done < <(saved)
  return 1
}

newest_step() {
  local newest=-1 path step
  for path in "$run"/checkpoints/step-*; do
    step=${path##*/step-}
    case $step in '' | *[!0-9]*) continue ;; esac
    if (( 10#$step > newest )); then newest=$((10#$step)); fi
  done
  echo "$newest"
}

# 2, a mistake, is never tried again; then a bad node, then a stop that has its checkpoint.
verdict() {
  local file said two='' bad='' stopped='' failed=''
  for file in "$folder"/status/*; do
    said=''
    { read -r said <"$file"; } 2>/dev/null
    case $said in 2) two=2 ;; 76) bad=76 ;; 75) stopped=75 ;; 1) failed=1 ;; esac
  done
  echo "${two:-${bad:-${stopped:-${failed:-$1}}}}"
}

# Ends the job: queued again, unless that has helped nothing too often. A month of time limits is
# no trouble, so only starts that came no further than all before them count.
requeue() {
  local why=$1 excluded=${2:-} idle=0 highest=$before
  if [[ -s $counted ]]; then { read -r idle highest <"$counted"; } 2>/dev/null; fi
  case $idle in '' | *[!0-9]*) idle=0 ;; esac
  case ${highest#-} in '' | *[!0-9]*) highest=$before ;; esac
  if (( after > highest )); then idle=0 highest=$after; else idle=$((idle + 1)); fi
  if (( max_requeues == 0 || idle > max_requeues )); then
    say "$why; not queued again (--max-requeues $max_requeues, and it has come no further" \
      "$idle times): submit the run again to go on"
    exit "$status"
  fi
  if ! command -v scontrol >/dev/null; then
    say "$why; not queued again without scontrol: submit the run again to go on"
    exit "$status"
  fi
  echo "$idle $highest" >"$counted" || say "$counted cannot be written; look at the disk"
  trap '' TERM  # which queueing again sends to this script
  if [[ -z $excluded ]]; then
    say "$why; queued again, nothing is to be done$(idle_times "$idle")"
    scontrol requeue "$job" && exit "$status"
  else
    say "$why; queued again without $excluded, which someone should look" \
      "at$(idle_times "$idle")"
    scontrol requeuehold "$job" && scontrol update "jobid=$job" "excnodelist=$excluded" &&
      scontrol release "$job" && exit "$status"
  fi
  say "job $job could not be queued again (Slurm's reason is above): submit the run again to go" \
    "on, or scontrol release $job if it is held"
  exit "$status"
}

idle_times() {
  if (( $1 > 0 )); then echo " (it has come no further $1 times, of at most $max_requeues)"; fi
}

# Whether the job's time is up: then Slurm ends this script too, though the run may have stopped
# well before. Of scancel Slurm gives no such reason.
time_is_up() {
  [[ $(scontrol show job -o "$job" 2>/dev/null) == *' Reason=TimeLimit '* ]]
}

# All nodes to do without: those of before, and those that preflight names; only plain names pass.
excluded_nodes() {
  local line all
  all=$(scontrol show job -o "$job" 2>/dev/null)
  if [[ $all =~ \ ExcNodeList=([^ ]+) && ${BASH_REMATCH[1]} != '(null)' ]]; then
    all=${BASH_REMATCH[1]}
  else
    all=''
  fi
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then all=$all${all:+,}$line; fi
  done <"$folder/bad_nodes"
  echo "$all"
}

before=$(newest_step)
saved_before=$(saved)
cancelled=''
trap 'cancelled=yes' TERM
start &
step=$!
while :; do
  wait "$step"
  status=$?
  # A signal ends `wait` and not the step.
  kill -0 "$step" 2>/dev/null || break
done
status=$(verdict "$status")
after=$(newest_step)
at="the newest checkpoint is of step $after"
if (( after < 0 )); then at='there is no checkpoint'; fi

if [[ -n $cancelled ]] && ! { [[ $status == 75 ]] && time_is_up; }; then
  say "job $job was ended from outside (scancel, its time, or a job that goes first); $at: submit" \
    "the run again to go on, unless Slurm queues the job again by itself"
  exit 143
fi
case $status in
  0) say "job $job is done: results are in $run"; exit 0 ;;
  2) say "job $job ended by a mistake that the line above names: correct it and submit again" ;;
  75) requeue "job $job was asked to stop; $at" ;;
  76)
    if ! [[ -s $folder/bad_nodes ]]; then
      say "job $job ended by a bad node that $folder/bad_nodes does not name: look above"
      exit 76
    fi
    requeue "job $job found a bad node" "$(excluded_nodes)"
    ;;
  *)
    if [[ -e $folder/again ]]; then requeue "job $job could not start, as said above; $at"; fi
    if saved_now; then requeue "job $job failed (status $status) after progress; $at"; fi
    say "job $job failed (status $status) without a new checkpoint, so it is not queued again;" \
      "$at: see the lines above and $run/logs"
    ;;
esac
exit "$status"
