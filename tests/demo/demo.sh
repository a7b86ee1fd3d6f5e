#!/bin/bash
# The main job, shown: a private daemon, the built-in model, no key. What follows a line with `$` is what
# that command printed.
set -u
home=$(mktemp -d)
export PATH="$(cd -- "$1" && pwd):$PATH" LLMPROC_SOCKET="$home/llmprocd.sock" LLMPROC_STATE_DIR="$home/state"
unset ANTHROPIC_API_KEY LLMPROC_PID
trap 'llmprocctl daemon stop >/dev/null 2>&1; rm -rf "$home"' EXIT
cd "$home" || exit 1

say() { printf '\n# %s\n' "$*"; }

# Show a command, run it, and go on only if it ended as expected.
run() {
    printf '$ %s\n' "$*"
    eval "$@"
    status=$?
    [ "$status" -eq "${expect:-0}" ] && return
    printf 'demo: expected status %s, got %s\n' "${expect:-0}" "$status" >&2
    exit 1
}

# Wait until a process sleeps on its input.
rests() {
    for _ in $(seq 300); do
        [ "$(llmprocctl ps --no-headers -o wchan "$1")" = fd:0 ] && return
        sleep 0.1
    done
    printf 'demo: process %s did not come to rest\n' "$1" >&2
    exit 1
}

say "A daemon of our own, and a process that runs a command with a long output."
run llmprocctl daemon start
run "llmprocctl spawn --name joe -i demo '!bash seq 1 5000
!say That was a long list.'"
rests %joe
run llmprocctl ps

say "That output has become a file, fd:3: exact to the byte, read page by page by the model."
run llmprocctl fd %joe
run "llmprocctl cat %joe/fd:3 | head -n 3"
run "llmprocctl history %joe | cut -c 1-100"

say "Fork it twice: both children share all of that history, and go ways of their own."
run "llmprocctl fork %joe --prompt '!say I remember the list.' --prompt '!exit 3'"
expect=3 run llmprocctl wait 4
rests 3
run llmprocctl ps -a --forest

say "Travel back in time. Nothing is deleted: the old branch stays readable."
run "llmprocctl goto %joe m1 -m '!say Let us start over.'"
rests %joe
run "llmprocctl history --all --graph %joe | cut -c 1-100"

say "Kill the daemon with -9, as a power cut would, and start it again: everything is there."
daemon=$(llmprocctl call sys.status | grep -o '"pid": *[0-9]*' | grep -o '[0-9]*')
run kill -9 "$daemon"
run llmprocctl daemon start
run llmprocctl ps -a
run "llmprocctl cat %joe/fd:3 | wc -c"

say "And end it: the exit status says how, 128 + SIGTERM."
run llmprocctl kill %joe
expect=143 run llmprocctl wait %joe
