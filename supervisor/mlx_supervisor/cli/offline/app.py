"""The commands as Typer sees them; what they do is imported when one is used."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Words = Annotated[list[str] | None, typer.Argument(metavar="[FILE|NAME]...", help="Settings files, names of runs.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", metavar="DIR", help="Read this state folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add `status`, `logs`, `history`, `compare` and `export`."""

    @app.command()
    def status(words: Words = None, state_dir: StateDir = None, json: Json = False) -> None:
        """Show where runs are. Needs no daemon."""
        from mlx_supervisor.cli.offline.status import status as show

        _exit(lambda: show(words or [], state_dir, as_json=json))

    @app.command()
    def logs(
        words: Words = None,
        state_dir: StateDir = None,
        follow: Annotated[bool, typer.Option("-f", "--follow", help="Print what is appended, until Ctrl-C.")] = False,
        stderr: Annotated[bool, typer.Option("--stderr", help="The worker's stderr.")] = False,
        lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Lines to begin with.")] = 40,
    ) -> None:
        """Show the end of a run's log. Needs no daemon."""
        from mlx_supervisor.cli.offline.logs import logs as show

        _exit(lambda: show(words or [], state_dir, follow=follow, stderr=stderr, lines=lines))

    @app.command()
    def history(
        words: Words = None,
        state_dir: StateDir = None,
        csv: Annotated[bool, typer.Option("--csv", help="Print a row for each generation.")] = False,
        json: Json = False,
    ) -> None:
        """List runs and their generations. With time, steps, batch, loss, memory and cause of each end."""
        from mlx_supervisor.cli.offline.history import history as show

        _exit(lambda: show(words or [], state_dir, as_csv=csv, as_json=json))

    @app.command()
    def compare(
        a: Annotated[str, typer.Argument(metavar="A", help="NAME, FILE, FILE:NAME, a run's folder or summary.json.")],
        b: Annotated[str, typer.Argument(metavar="B", help="The other run.")],
        state_dir: StateDir = None,
        json: Json = False,
    ) -> None:
        """Compare two runs. Shows settings that differ, losses at equal steps, speed, time, trips."""
        from mlx_supervisor.cli.offline.compare import compare as show

        _exit(lambda: show((a, b), state_dir, as_json=json))

    @app.command()
    def export(
        words: Words = None,
        step: Annotated[int | None, typer.Option("--step", metavar="N", help="Default: the newest checkpoint.")] = None,
        output: Annotated[
            Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="NAME-step-N here if left out.")
        ] = None,
        force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
        state_dir: StateDir = None,
    ) -> None:
        """Write the adapters of a checkpoint, as a run does at its end. Needs no daemon."""
        from mlx_supervisor.cli.offline.export import export as write

        _exit(lambda: write(words or [], state_dir, step=step, output=output, force=force))


def _exit(command: Callable[[], int]) -> None:
    """Run a command, and exit with its status: 2 for wrong arguments or settings."""
    from mlx_supervisor.cli.offline.places import UsageError
    from mlx_supervisor.settings.schema import SettingsError

    try:
        code = command()
        sys.stdout.flush()
    except (UsageError, SettingsError) as error:
        print(error, file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `mlx-supervisor history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
