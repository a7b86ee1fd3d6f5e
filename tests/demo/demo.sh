#!/bin/bash
# The main job, shown: a private daemon, the built-in model, no key. Every line it prints below a `$` is
# what that command printed.
set -u
bin=$1
home=$(mktemp -d)
export PATH="$bin:$PATH" LLMPROC_SOCKET="$home/llmprocd.sock" LLMPROC_STATE_DIR="$home/state"
unset ANTHROPIC_API_KEY LLMPROC_PID
trap 'llmprocctl daemon stop >/dev/null 2>&1; rm -rf "$home"' EXIT
cd "$home" || exit 1

say() { printf '\n# %s\n' "$*"; }
run() {
    printf '$ %s\n' "$*"
    eval "$@"
    status=$?
    [ "$status" -eq "${expect:-0}" ] || { echo "demo: expected status ${expect:-0}, got $status" >&2; exit 1; }
}

say "A daemon of our own, and a process that runs a command with a long output."
run llmprocctl daemon start
run "llmprocctl spawn --name joe -i demo '!bash seq 1 5000
!say That was a long list.'"
pid=$(llmprocctl ps -q)
until llmprocctl logs "$pid" | grep -q 'long list'; do sleep 0.1; done

say "Its output is a file: fd:3, exact to the byte."
run llmprocctl ps
run llmprocctl fd "$pid"
run "llmprocctl cat $pid/fd:3 | tail -n 3"
run llmprocctl history "$pid"

say "Fork it twice: the children share all of that history, and each goes its own way."
run "llmprocctl fork $pid --prompt '!say I am the first child.' --prompt '!exit 3'"
children=$(llmprocctl ps -a -q | awk -v p="$pid" '$1 > p')
for child in $children; do llmprocctl kill -0 "$child" 2>/dev/null && llmprocctl send --close "$child" '!say bye' 2>/dev/null; done
expect=3 run llmprocctl wait $children

say "Travel back in time: joe forgets the list. Nothing is deleted."
first=$(llmprocctl history "$pid" --json | head -n 1 | sed 's/.*"id": *"\([^"]*\)".*/\1/')
run "llmprocctl goto $pid $first -m '!say Let us start over.'"
sleep 0.5
run llmprocctl history --graph --all "$pid"

say "Kill the daemon with -9, as a power cut would, and start it again: everything is there."
daemon=$(llmprocctl call sys.status | sed 's/.*"pid": *\([0-9]*\).*/\1/;t;d' | head -n 1)
run kill -9 "$daemon"
run llmprocctl daemon start
run llmprocctl ps -a
run "llmprocctl cat $pid/fd:3 | head -n 2"

say "And end it."
run llmprocctl kill "$pid"
expect=143 run llmprocctl wait "$pid"
