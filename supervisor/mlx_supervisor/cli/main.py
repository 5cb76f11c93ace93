"""The command `mlx-supervisor`."""

import os
import sys
from pathlib import Path
from typing import Annotated


def main() -> None:
    """Entry point. `serve` goes past the command-line library: the daemon stays small."""
    _hold_standard_descriptors()
    if sys.argv[1:2] == ["serve"]:
        from mlx_supervisor.cli.serve import serve

        sys.exit(serve(sys.argv[2:]))
    _typer_app()


def _hold_standard_descriptors() -> None:
    """Where somebody closed one of them (`2>&-`), a file of ours would get its number, and the worker's output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _typer_app() -> None:
    import typer

    import mlx_supervisor

    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=mlx_supervisor.__doc__)

    def version(wanted: bool) -> None:
        if wanted:
            typer.echo(mlx_supervisor.__version__)
            raise typer.Exit

    @app.callback()
    def options(
        _: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="Print it and exit.")
        ] = False,
    ) -> None:
        """Supervises MLX training: start a run, walk away; it finishes."""

    @app.command()
    def run(
        file: Annotated[Path, typer.Argument(help="The settings file (TOML).")],
        name: Annotated[str | None, typer.Argument(help="The run, if the file has several.")] = None,
        json: Annotated[bool, typer.Option("--json", help="End with the summary as one line of JSON.")] = False,
        fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew; the old run's folder is set aside.")] = False,
        state_dir: Annotated[Path | None, typer.Option(help="Where checkpoints, logs and the journal go.")] = None,
        bare: Annotated[
            bool, typer.Option("--bare", help="Without supervision, under the same memory limit: to see it die.")
        ] = False,
    ) -> None:
        """Run one training in the foreground, with live progress; exits 0 when it completed."""
        from mlx_supervisor.cli import bare as bare_run
        from mlx_supervisor.cli import run as foreground

        command = bare_run.run_bare if bare else foreground.run
        sys.exit(command(file, name, state_dir=state_dir, as_json=json, fresh=fresh))

    @app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def serve(context: typer.Context) -> None:
        """Be the daemon, in the foreground (launchd and systemd want it so)."""
        from mlx_supervisor.cli.serve import serve as serve_daemon

        sys.exit(serve_daemon(context.args))

    app()
