"""`mlx-supervisor run`: one run in the foreground."""

import asyncio
import json
import secrets
import sys
from dataclasses import replace
from typing import Any, TextIO, cast

from rich.console import Console

from mlx_supervisor.cli.display import Display, LiveDisplay, PlainDisplay
from mlx_supervisor.cli.nonblocking_stream import NonblockingStream
from mlx_supervisor.cli.request.exit_statuses import EXIT_COMPLETED, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_WRONG_SETTINGS
from mlx_supervisor.cli.request.request import RunRequest
from mlx_supervisor.cli.signals import handle_signals
from mlx_supervisor.cli.summary_text import print_summary, was_refused
from mlx_supervisor.control.transport.unix_socket import SocketFileError
from mlx_supervisor.core.events import CommandKind
from mlx_supervisor.daemon.service import Service
from mlx_supervisor.journal.database import JournalError
from mlx_supervisor.logs import daemon_log
from mlx_supervisor.settings.schema import Settings, SettingsError
from mlx_supervisor.state_dir import StateDir, StateDirError


def run(request: RunRequest, *, as_json: bool, fresh: bool) -> int:
    """Run to the end; returns the exit code (`EXIT_…`). With `as_json`, everything but the JSON line goes to stderr."""
    stream = NonblockingStream(sys.stderr if as_json else sys.stdout)
    console = Console(file=cast(TextIO, stream), highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        settings, chosen = request.read()
        if fresh and f"{chosen}.previous" in settings.runs:
            problem = f"runs: {chosen}.previous is the folder to which --fresh moves {chosen}; rename that run"
            raise SettingsError([problem], settings.path)
        if fresh:
            settings = replace(settings, fresh=secrets.token_hex(8))
        state = StateDir(settings.state_dir)
    except (SettingsError, StateDirError) as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_SETTINGS
    try:
        daemon_log.configure(state.log, console=False)
        summary, interrupted = asyncio.run(_foreground(settings, state, chosen, console, fresh))
    except (SettingsError, StateDirError, JournalError, SocketFileError, OSError) as error:
        print(f"{chosen}: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTINGS if isinstance(error, (SettingsError, StateDirError)) else EXIT_FAILED
    finally:
        state.close()
    folder = settings.run_dir(chosen)
    stream.settle()
    stream.flush()  # a refusal is the last line, and no summary follows that would wait for it
    if not was_refused(summary):
        print_summary(console, summary, folder, request.command())
    if as_json:
        line = NonblockingStream(sys.stdout)
        line.settle()
        line.write(json.dumps(summary, allow_nan=False) + "\n")
        line.flush()
    return _exit_code(summary, interrupted)


def _exit_code(summary: dict[str, Any], interrupted: bool) -> int:
    if summary["outcome"] == "completed":
        return EXIT_COMPLETED
    if was_refused(summary):
        return EXIT_WRONG_SETTINGS
    return EXIT_INTERRUPTED if interrupted or summary["outcome"] == "stopped" else EXIT_FAILED


def _person(reason: str) -> str:
    """A reason with a signal's name as a person knows it."""
    return reason.replace("SIGINT", "Ctrl-C")


async def _foreground(
    settings: Settings, state: StateDir, name: str, console: Console, fresh: bool
) -> tuple[dict[str, Any], bool]:
    display: Display = LiveDisplay(console, name) if console.is_terminal else PlainDisplay(console, name)
    alone = replace(settings, runs={name: settings.runs[name]})
    service = Service(alone, state, [display])
    await service.open(forget=[name] if fresh else [])
    run = service.daemon.runs[name]
    if (kept := service.daemon.set_aside.get(name)) is not None:
        console.print(f"The former run is kept in {kept}; `mlx-supervisor export {kept.name}` writes its result.")

    def stop(name: str) -> None:
        if not received:
            run.command(CommandKind.STOP, _person(name))
            console.print("A second Ctrl-C kills the worker without a checkpoint.")

    def kill(reason: str) -> None:
        run.command(CommandKind.KILL, _person(reason))
        console.print("The last complete checkpoint is kept.")

    received = handle_signals(stop, kill)
    with display:
        try:
            await service.daemon.recovered()
            if received:
                run.command(CommandKind.STOP, "interrupted before the start")
            else:
                run.command(CommandKind.START, "command line")
            await run.until(lambda: run.at_rest)
            summary = run.summary()
            if refused := run.machine.history.refused:  # the run is as before, but this command failed
                summary |= {"outcome": "failed", "reason": refused}
        finally:
            await service.close()
    return summary, bool(received)
