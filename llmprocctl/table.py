"""Every command: its words, its help and the function that does it.

Law: this table is all that either parser knows. `_hot` reads exact command lines with it in microseconds,
`cli` builds click commands from it for help, errors and everything else; a test holds the two together.
Law: it imports nothing, so that the list of commands costs nothing.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    Kind: TypeAlias = Literal["flag", "text", "int", "count", "nice", "duration", "many"]
    Count: TypeAlias = Literal["one", "maybe", "some", "any"]


class Option:
    """One option. `dest` is the argument of the function that gets its value."""

    __slots__ = ("dest", "help", "kind", "metavar", "names")

    def __init__(self, names: str, kind: "Kind", help_: str, dest: str = "", metavar: str = "") -> None:
        self.names = tuple(names.split())
        self.kind: Kind = kind
        self.help = help_
        self.dest = dest or self.names[-1].lstrip("-").replace("-", "_")
        self.metavar = metavar

    @property
    def default(self) -> "bool | tuple[()] | None":
        """The value when the option is not given."""
        return {"flag": False, "many": ()}.get(self.kind)


class Operand:
    """What is no option. `one` is a text, `maybe` a text or "", `some` and `any` are tuples of texts."""

    __slots__ = ("count", "dest", "metavar")

    def __init__(self, metavar: str, count: "Count" = "one", dest: str = "") -> None:
        self.metavar = metavar
        self.count: Count = count
        self.dest = dest or metavar.lower()


class Command:
    """One command. `run` is `module:function`, called with a Session and the values."""

    __slots__ = ("example", "fixed", "help", "more", "operands", "options", "run")

    def __init__(
        self,
        run: str,
        help_: str,
        *operands: Operand,
        options: tuple[Option, ...] = (),
        example: str = "",
        more: str = "",
        fixed: "dict[str, str] | None" = None,
    ) -> None:
        self.run = run
        self.help = help_
        self.more = more
        self.example = example
        self.operands = operands
        self.options = options
        self.fixed = fixed or {}


_JSON = Option("--json", "flag", "One JSON object a line.", "json")
_QUIET = Option("-q --quiet", "flag", "Ids only.", "quiet")
_FOLLOW = Option("-f --follow", "flag", "Wait for more.", "follow")
_PID = Operand("PID")
_PIDS = Operand("PID", "some", "pids")
_SPAWN = (
    Option("--name", "text", "A name; %NAME then stands for the pid.", metavar="NAME"),
    Option("--nice", "nice", "-20 (first) to 19 (last); the default is 0.", metavar="N"),
    Option("--cwd", "text", "Its working directory; the default is the one you are in.", metavar="DIR"),
    Option("--env", "many", "A variable for its tools; may be repeated.", metavar="K=V"),
    Option("--limit", "many", "A limit, as in wall=10m; may be repeated.", metavar="NAME=VALUE"),
    Option("--access", "text", "What it may do: read, write or admin.", metavar="LEVEL"),
)

GLOBALS = (
    Option("-H --host", "text", "The daemon's address: unix:///path.", metavar="URL"),
    Option("--socket", "text", "The daemon's socket.", metavar="PATH"),
)

COMMANDS = {
    "spawn": Command(
        "cmd_proc:spawn",
        "Start a process and print its pid.",
        Operand("PROGRAM"),
        Operand("PROMPT", "any"),
        options=(Option("-i --interactive", "flag", "Keep fd 0 open for `send`."), *_SPAWN),
        example='llmprocctl spawn coder "Fix the flaky test in tests/test_io.py"',
        more="The prompt's words are joined by spaces; a prompt `-` is read from stdin. Exits 127 when there "
        "is no such program, 126 when it cannot start.",
    ),
    "run": Command(
        "cmd_run:run",
        "Start a process, show what it says, wait for it, and exit with its status.",
        Operand("PROGRAM"),
        Operand("PROMPT", "any"),
        options=(
            Option("-n --no-stdin", "flag", "Leave stdin alone; else, if it is no terminal, it is appended."),
            Option("--json", "flag", "Print one run result instead of the text.", "json"),
            Option("--timeout", "duration", "Send TERM after this long, and exit 124.", metavar="TIME"),
            Option("--rm", "flag", "Remove the process afterwards.", "remove"),
            *_SPAWN,
        ),
        example='git diff | llmprocctl run review "Review this"',
        more="^C sends INT, the second TERM, the third KILL.",
    ),
    "ps": Command(
        "cmd_ps:ps",
        "List processes.",
        Operand("PID", "any", "pids"),
        options=(
            Option("-a --all", "flag", "Ended and collected ones too, and pid 1."),
            Option("-o --columns", "many", "Columns: pid,stat,cost; `pid=` has no header.", metavar="LIST"),
            Option("--forest", "flag", "Draw who is whose child."),
            Option("--sort", "text", "Columns to sort by; -cost: the largest first.", metavar="LIST"),
            Option("--no-headers", "flag", "Leave the first line out."),
            _QUIET,
            _JSON,
        ),
        example="llmprocctl ps -a --sort=-cost",
    ),
    "kill": Command(
        "cmd_proc:kill",
        "Send a signal to processes; TERM if none is named.",
        Operand("PID", "any", "pids"),
        options=(
            Option("-s --signal", "text", "The signal, by name or number; also -9, -TERM.", metavar="SIG"),
            Option("-l --list", "flag", "Print the signals, or the name of a number.", "names"),
        ),
        example="llmprocctl kill -INT 42; llmprocctl kill -- -42",
        more="-PID stands for a process and all its descendants; write `--` before it.",
    ),
    "stop": Command(
        "cmd_proc:kill",
        "Let processes start nothing new until `cont`.",
        _PIDS,
        fixed={"signal": "STOP"},
        example="llmprocctl stop 42",
    ),
    "cont": Command(
        "cmd_proc:kill",
        "Let stopped processes go on.",
        _PIDS,
        fixed={"signal": "CONT"},
        example="llmprocctl cont 42",
    ),
    "wait": Command(
        "cmd_proc:wait",
        "Wait for processes to end; exit with the status of the last.",
        _PIDS,
        options=(
            Option("-n --any", "flag", "Wait for the first that ends, and exit with its status.", "first"),
            Option("--timeout", "duration", "Give up after this long, and exit 124.", metavar="TIME"),
            _JSON,
        ),
        example="llmprocctl wait --timeout 10m 42 43",
        more="Exits 127 when there is no such process.",
    ),
    "send": Command(
        "cmd_proc:send",
        "Send a process its next user message.",
        _PID,
        Operand("TEXT", "any"),
        options=(Option("--close", "flag", "Close its fd 0 after it."),),
        example='llmprocctl send 42 "also run the linter"',
        more="The text `-` is read from stdin. The message is durable when the command returns.",
    ),
    "attach": Command(
        "cmd_run:attach",
        "Show live what a process says and does, and send it lines.",
        _PID,
        example="llmprocctl attach 42",
        more="Lines typed on a terminal are sent to it. ^P^Q detaches, ^C sends INT.",
    ),
    "logs": Command(
        "cmd_log:logs",
        "Show what a process said and did so far.",
        _PID,
        options=(
            _FOLLOW,
            Option("-n --lines", "count", "The last lines only.", metavar="LINES"),
            Option("--since", "duration", "What is not older than this.", metavar="TIME"),
        ),
        example="llmprocctl logs -f -n 20 42",
    ),
    "events": Command(
        "cmd_log:events",
        "Show every event.",
        Operand("PID", "any", "pids"),
        options=(
            _FOLLOW,
            Option("--after", "count", "Only those after this number.", metavar="SEQ"),
            _JSON,
            _QUIET,
        ),
        example="llmprocctl events -f --json 42",
    ),
    "history": Command(
        "cmd_history:history",
        "Show the messages a process stands on.",
        _PID,
        options=(
            Option("-a --all", "flag", "Those of every branch."),
            Option("--graph", "flag", "Draw the tree of all branches."),
            _QUIET,
            _JSON,
        ),
        example="llmprocctl history --graph 42",
    ),
    "fork": Command(
        "cmd_history:fork",
        "Copy a process, history and all; print the pids.",
        _PID,
        options=(
            Option("--prompt", "many", "The next message of a child; one child each.", "prompts", "TEXT"),
            Option("--at", "text", "Fork at this message, or at the `last` that can be.", metavar="MSG"),
        ),
        example='llmprocctl fork 42 --prompt "try A" --prompt "try B"',
    ),
    "goto": Command(
        "cmd_history:goto",
        "Move a process to another message of its history.",
        _PID,
        Operand("MSG"),
        options=(
            Option("-m --message", "text", "What it is told there.", metavar="TEXT"),
            Option("--run", "flag", "Go on from there without a new text."),
        ),
        example='llmprocctl goto 42 m9 -m "Leave that alone; look at the fixture"',
    ),
    "exec": Command(
        "cmd_history:exec_",
        "Replace the program of a process.",
        _PID,
        Operand("PROGRAM"),
        example="llmprocctl exec 42 ./reviewer.toml",
    ),
    "fd": Command(
        "cmd_file:fd",
        "List open descriptors.",
        Operand("PID", "any", "pids"),
        options=(_QUIET, _JSON),
        example="llmprocctl fd 42",
    ),
    "cat": Command(
        "cmd_file:cat",
        "Write the contents of descriptors to stdout.",
        Operand("FD", "some", "fds"),
        options=(
            Option("-p --pid", "text", "Whose descriptor a bare fd:3 is.", metavar="PID"),
            _FOLLOW,
            Option("--page", "int", "One page, from 1.", metavar="N"),
            Option("--lines", "text", "Lines A to B, from 1.", metavar="A-B"),
            Option("--grep", "text", "The lines that a pattern matches.", metavar="RE"),
        ),
        example="llmprocctl cat 42/fd:3",
        more="FD is fd:3, 42/fd:3 or ref:NAME.",
    ),
    "limits": Command(
        "cmd_info:limits",
        "Show the limits of a process, or change them.",
        _PID,
        Operand("NAME=VALUE", "any", "changes"),
        options=(_QUIET, _JSON),
        example="llmprocctl limits 42 wall=10m",
    ),
    "renice": Command(
        "cmd_proc:renice",
        "Change how processes are weighed against others.",
        Operand("N", "one", "nice"),
        _PIDS,
        example="llmprocctl renice 10 42",
    ),
    "inspect": Command(
        "cmd_info:inspect",
        "Print all there is about processes, as JSON.",
        _PIDS,
        options=(_JSON,),
        example="llmprocctl inspect 42",
    ),
    "programs": Command(
        "cmd_info:programs",
        "List programs, or check program files.",
        Operand("[check FILE]", "any", "words"),
        options=(_QUIET, _JSON),
        example="llmprocctl programs check ./coder.toml",
    ),
    "rm": Command("cmd_proc:rm", "Remove ended processes.", _PIDS, example="llmprocctl rm 42"),
    "gc": Command(
        "cmd_daemon:gc",
        "Free what nothing refers to any more: the messages and files of removed processes.",
        options=(Option("--dry-run", "flag", "Only say how much that is."), _JSON),
        example="llmprocctl gc --dry-run",
        more="The daemon does it by itself once a day.",
    ),
    "daemon": Command(
        "cmd_daemon:daemon",
        "Start, stop, look at or reload the daemon: start, stop, status, reload.",
        Operand("ACTION", "one", "action"),
        options=(_JSON,),
        example="llmprocctl daemon status",
        more="`status` exits 0 when it runs, 3 when it does not.",
    ),
    "local": Command(
        "cmd_local:local",
        "Have a small real model run on this machine: up, down, status.",
        Operand("ACTION", "one", "action"),
        options=(
            Option(
                "--model", "text", "0.5b (fetches 0.5 GB, once) or 1.5b (1.1 GB, and better).", metavar="NAME"
            ),
            Option("--threads", "count", "How many cores it may use; the default is all.", metavar="N"),
            _JSON,
        ),
        example="llmprocctl local up && llmprocctl run local 'What is 12*34?'",
        more='Programs with `provider = "local"` then use it. It is there again whenever the daemon runs, '
        "until `down`. `status` exits 0 when it is up, 3 when it is not.",
    ),
    "call": Command(
        "cmd_info:call",
        "Make a raw call, and print the result as JSON.",
        Operand("METHOD"),
        Operand("JSON", "maybe"),
        example="""llmprocctl call proc.list '{"all": true}'""",
        more="The JSON `-` is read from stdin.",
    ),
    "api": Command(
        "cmd_info:api",
        "List the daemon's methods.",
        options=(_QUIET, _JSON),
        example="llmprocctl api --json",
    ),
}


def normalised(command: str, words: list[str]) -> list[str]:
    """The words after a command, where a number may follow a dash and be no option."""
    if command == "kill":
        from llmprocctl import signals

        return signals.arguments(words)
    if command == "renice":
        if words[:1] == ["-n"]:
            words = words[1:]
        if words and words[0].startswith("-") and words[0][1:].isdecimal():
            return ["--", *words]
    return words
