"""Click commands made from the table: help, errors, completion, and every unusual command line.

Law: the list of commands is the table's; no command's module is imported to print it.
"""

from typing import Any

import click

from llmprocctl import _hot, session, table
from llmprocd import __version__

_EPILOG = """\b
PID is a number or %NAME. Exit status: 0; 1 an operand failed; 2 usage;
124 timed out; 125 no daemon; 126 cannot start; 127 no such program or
process; 130 interrupted; else the process's own."""


class _Converted(click.ParamType[Any]):
    """A value that `_hot.convert` reads."""

    def __init__(self, kind: "table.Kind", metavar: str) -> None:
        self.kind: table.Kind = kind
        self.name = metavar or kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return _hot.convert(self.kind, value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class _Verb(click.Command):
    """A command of the table."""

    def __init__(self, name: str, entry: table.Command) -> None:
        self.entry = entry
        params: list[click.Parameter] = [_option(option) for option in entry.options]
        params += [_argument(operand) for operand in entry.operands]
        super().__init__(
            name,
            callback=self.go,
            params=params,
            help="\n\n".join(filter(None, (entry.help, entry.more, f"\b\nExample: {entry.example}"))),
            short_help=entry.help,
            no_args_is_help=False,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the words, once a dash before a number is no riddle any more."""
        return super().parse_args(ctx, table.normalised(str(self.name), args))

    def go(self, **values: Any) -> int:
        """Run it."""
        settings = click.get_current_context().find_root().params
        given = {"host": settings["host"], "socket": settings["socket"]}
        return session.run(given, str(self.name), values | self.entry.fixed)


class _Verbs(click.Group):
    """The table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the table's order, which is that of the manual."""
        del ctx
        return list(table.COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Made when asked for."""
        del ctx
        entry = table.COMMANDS.get(cmd_name)
        return None if entry is None else _Verb(cmd_name, entry)


def group() -> click.Group:
    """The whole command line."""
    made = _Verbs(
        "llmprocctl",
        params=[_option(option) for option in table.GLOBALS],
        help="Start, watch and steer the processes of llmprocd.",
        epilog=_EPILOG,
        context_settings={"help_option_names": ["--help"], "max_content_width": 100},
    )
    return click.version_option(__version__, prog_name="llmprocctl", message="%(prog)s %(version)s")(made)


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        status = group().main(args, prog_name="llmprocctl", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        exc.show()
        return exc.exit_code
    except click.UsageError as exc:
        _complain(exc)
        return exc.exit_code
    except click.Abort:
        return session.INTERRUPTED
    return status if isinstance(status, int) else 0


def _complain(exc: click.UsageError) -> None:
    """Say what is wrong as every other command does, and where the help is."""
    path = exc.ctx.command_path if exc.ctx is not None else "llmprocctl"
    name = path.removeprefix("llmprocctl").strip()
    session.complain(f"{name}: {exc.format_message()}" if name else exc.format_message())
    session.tell(f"Try '{path} --help' for help.")


def _option(option: table.Option) -> click.Option:
    names = [option.dest, *option.names]
    if option.kind == "flag":
        return click.Option(names, is_flag=True, default=False, help=option.help)
    many = option.kind == "many"
    return click.Option(
        names,
        type=_Converted(option.kind, option.metavar),
        multiple=many,
        default=() if many else None,
        help=option.help,
        metavar=option.metavar or None,
    )


def _argument(operand: table.Operand) -> click.Argument:
    required = operand.count in {"one", "some"}
    shape = {"one": "{}", "maybe": "[{}]", "some": "{}...", "any": "[{}...]"}[operand.count]
    optional: dict[str, Any] = {} if required else {"default": "" if operand.count == "maybe" else ()}
    return click.Argument(
        [operand.dest],
        nargs=-1 if operand.count in {"some", "any"} else 1,
        required=required,
        metavar=operand.metavar if "[" in operand.metavar else shape.format(operand.metavar),
        **optional,
    )
