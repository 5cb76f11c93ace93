"""`supervisorctl`: prints and exits like Supervisord's client, and shows the progress of training."""

import argparse
import os
import sys
import xmlrpc.client
from collections.abc import Callable
from pathlib import Path

from mlx_supervisor.cli.ctl import commands as commands
from mlx_supervisor.cli.ctl.client import DaemonClient, DaemonError
from mlx_supervisor.cli.ctl.commands import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_NOT_RUNNING,
    EXIT_STATUS_UNKNOWN,
    EXIT_USAGE,
    UsageError,
)
from mlx_supervisor.settings.paths import DEFAULT_FILE

SOCKET_NAME = "supervisor.sock"


def main() -> None:
    """The command's entry point."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run the command in the arguments. Returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    parser, parsers = build_parsers()
    options = parser.parse_args(argv)
    if options.command == "help":
        return _help(parser, parsers, options.about)
    command: Callable[[DaemonClient, argparse.Namespace], int] = options.run
    try:
        daemon = DaemonClient(socket_path(options.serverurl, options.configuration))
        code = command(daemon, options)
        sys.stdout.flush()
        return code
    except UsageError as error:
        parser.exit(EXIT_USAGE, f"supervisorctl: {error}\n")
    except DaemonError as error:
        return _unreachable(error, options.command)
    except xmlrpc.client.Fault as fault:
        print(f"ERROR ({commands.reason(fault.faultCode, fault.faultString)})", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `supervisorctl tail … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _unreachable(error: DaemonError, command: str) -> int:
    print(f"supervisorctl: {error}", file=sys.stderr)
    if error.absent:
        print(
            "Start it with `mlx-supervisor serve -c FILE`, or choose another with -s unix:///PATH or -c FILE.",
            file=sys.stderr,
        )
    if command == "status":
        return EXIT_STATUS_UNKNOWN
    return EXIT_NOT_RUNNING if error.absent else EXIT_FAILED


def socket_path(url: str | None, configuration: Path | None) -> str:
    """The socket that the options name, else that of the settings file that `serve` reads by default.

    Without that file: in the folder MLX_SUPERVISOR_STATE_DIR, else in the user's state folder. Raises UsageError.
    """
    if url is not None:
        if not url.startswith("unix://") or len(url) == len("unix://"):
            raise UsageError(f"-s {url}: allowed is unix:///PATH; the supervisor listens on a Unix socket only")
        return str(Path(url.removeprefix("unix://")).expanduser().absolute())
    if configuration is None and DEFAULT_FILE.expanduser().exists():
        configuration = DEFAULT_FILE
    if configuration is not None:
        from mlx_supervisor.settings.reader import read_settings  # slow to import, and rarely needed
        from mlx_supervisor.settings.schema import SettingsError

        try:
            return str(read_settings(configuration).state_dir / SOCKET_NAME)
        except SettingsError as error:
            raise UsageError(str(error)) from error
    from_environment = os.environ.get("MLX_SUPERVISOR_STATE_DIR")
    if from_environment:
        return str(Path(from_environment).expanduser().absolute() / SOCKET_NAME)
    import platformdirs

    return str(platformdirs.user_state_path("mlx-supervisor") / SOCKET_NAME)


def _help(parser: argparse.ArgumentParser, parsers: dict[str, argparse.ArgumentParser], about: str | None) -> int:
    if about is not None and about not in parsers:
        print(f"supervisorctl: unknown command {about}; allowed: {', '.join(sorted(parsers))}", file=sys.stderr)
        return EXIT_USAGE
    (parsers[about] if about else parser).print_help()
    return 0


_SOME_NAMES = ("status", "pid", "info", "update")
_NAMES = ("start", "stop", "restart", "clear", "add", "remove")
_WITHOUT = ("version", "avail", "reread", "reload", "shutdown")


def build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of the commands by name."""
    parser = argparse.ArgumentParser(prog="supervisorctl", description="Control the training runs of a supervisor.")
    parser.add_argument(
        "-s", "--serverurl", metavar="URL", help="the supervisor's socket: unix:///PATH/supervisor.sock"
    )
    parser.add_argument(
        "-c", "--configuration", metavar="FILE", type=Path, help="the supervisor's settings, to find its socket"
    )
    parser.set_defaults(command="status", run=commands.status, names=[])
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands (default: status)")
    parsers = {}
    for name in (*_SOME_NAMES, *_NAMES, *_WITHOUT, "signal", "tail", "maintail", "help"):
        function = getattr(commands, name, None)
        summary = (function.__doc__ if function else "Show what a command does.") or ""
        parsers[name] = subparsers.add_parser(name, help=summary, description=summary)
        parsers[name].set_defaults(command=name, run=function)
    for name in _SOME_NAMES:
        parsers[name].add_argument("names", nargs="*", metavar="NAME", help="a run; `all`, or no name, for all")
    for name in (*_NAMES, "signal"):
        if name == "signal":
            parsers[name].add_argument("signal", metavar="SIGNAL", help="name or number: HUP, SIGUSR1, 15")
        parsers[name].add_argument("names", nargs="+", metavar="NAME", help="a run; `all` for all")
    for name in ("tail", "maintail"):
        parsers[name].add_argument("-f", dest="follow", action="store_true", help="follow until interrupted")
        what = "[-BYTES] NAME [stdout|stderr]" if name == "tail" else "[-BYTES]"
        parsers[name].add_argument("words", nargs="*", metavar="WORD", help=what)
    parsers["help"].add_argument("about", nargs="?", metavar="COMMAND")
    return parser, parsers


if __name__ == "__main__":
    main()
