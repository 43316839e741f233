#!/usr/bin/env bash
# Runs a training until it has finished, on each host:
#
#   keep_running.sh LOG python train.py --config=... --workdir=...
#
# Starts the command again after a pre-emption, the loss of another process (status 75) or a crash
# (a signal), at most $MAX_RESTARTS times (100). An error of the user's (status 1 or 2) ends it.
# On SIGTERM it passes the signal on, waits for the checkpoint, and ends with 75, which tells a job
# scheduler to start it again.
set -u
log=$1
shift
stopping=""
child=""
trap 'stopping=1; [ -n "$child" ] && kill -TERM "$child" 2>/dev/null' TERM INT

restarts=0
while true; do
  run_log=$(mktemp)
  "$@" > >(tee -a "$log" "$run_log") 2>&1 &
  child=$!
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the child
    wait "$child"
    status=$?
  done
  sleep 0.3 # for tee
  unfinished=""
  grep -q "; the same command goes on" "$run_log" && unfinished=1
  rm -f "$run_log"
  if [ "$status" -eq 0 ] && [ -z "$unfinished" ]; then
    exit 0
  elif [ -n "$stopping" ]; then
    exit 75
  elif [ "$status" -ne 0 ] && [ "$status" -ne 75 ] && [ "$status" -lt 128 ]; then
    exit "$status"
  fi
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "${MAX_RESTARTS:-100}" ]; then
    echo "keep_running: still not finished after $((restarts - 1)) restarts (status $status)" | tee -a "$log"
    exit 75
  fi
  echo "keep_running: status $status, restart $restarts" | tee -a "$log"
  sleep "${RESTART_SECONDS:-10}" & wait $!
  [ -n "$stopping" ] && exit 75
done
