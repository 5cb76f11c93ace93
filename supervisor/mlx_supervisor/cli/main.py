"""The command `mlx-supervisor`."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mlx_supervisor.cli.request.exit_statuses import EXIT_WRONG_SETTINGS

if TYPE_CHECKING:
    from mlx_supervisor.cli.request.request import RunRequest

START = "To begin: mlx-supervisor run lora.yaml, with your configuration file of mlx_lm.lora."


def main() -> None:
    """Entry point. `serve` does not load the command-line library: it would cost the daemon memory."""
    _hold_standard_descriptors()
    if sys.argv[1:2] == ["serve"]:
        from mlx_supervisor.cli.serve import serve

        sys.exit(serve(sys.argv[2:]))
    if sys.argv[1:] and sys.argv[1].endswith((".yaml", ".yml", ".toml")):
        print(
            f"No command is given; did you mean: {shlex.join(['mlx-supervisor', 'run', *sys.argv[1:]])}",
            file=sys.stderr,
        )
        sys.exit(EXIT_WRONG_SETTINGS)
    _typer_app()


def _hold_standard_descriptors() -> None:
    """Open closed standard descriptors (`2>&-`): otherwise a file opened later gets the number, and the output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _typer_app() -> None:
    import typer

    import mlx_supervisor
    from mlx_supervisor.cli.offline.app import add_commands
    from mlx_supervisor.cli.request.options import takes_run
    from mlx_supervisor.cli.request.request import RunRequest

    app = typer.Typer(
        add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=f"{mlx_supervisor.__doc__}\n\n{START}"
    )

    def version(requested: bool) -> None:
        if requested:
            typer.echo(mlx_supervisor.__version__)
            raise typer.Exit

    @app.callback()
    def options(
        _: Annotated[
            bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
        ] = False,
    ) -> None:
        """Supervise MLX training runs: checkpoint and restart them before memory runs out, and after crashes."""

    @app.command("train", help="The same as run.")
    @app.command("run")
    @takes_run
    def run(
        request: RunRequest,
        json: Annotated[bool, typer.Option("--json", help="Print the summary as one line of JSON at the end.")] = False,
        fresh: Annotated[
            bool,
            typer.Option("--fresh", help="Start over; keep the old run as NAME.previous, old adapters in previous/."),
        ] = False,
        bare: Annotated[
            bool, typer.Option("--bare", help="Run without supervision, under the same memory limit.")
        ] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Train nothing: the same as check.")] = False,
    ) -> None:
        """Train in the foreground, with live progress. FILE is an mlx_lm configuration file or a settings file."""
        sys.exit(_run(request, as_json=json, fresh=fresh, bare=bare, dry_run=dry_run))

    @app.command("check")
    @takes_run
    def check(
        request: RunRequest,
        measure: Annotated[
            bool, typer.Option("--measure", help="Measure memory and time of a few updates at several batch sizes.")
        ] = False,
        json: Annotated[bool, typer.Option("--json", help="Print the report as one line of JSON.")] = False,
    ) -> None:
        """Examine a run without training. Checks settings, model, data, output folder, disk and memory."""
        from mlx_supervisor.cli.check.command import check as check_run

        sys.exit(check_run(request, measures=measure, as_json=json))

    @app.command("init")
    @takes_run
    def init(
        request: RunRequest,
        output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")] = Path("settings.toml"),
    ) -> None:
        """Write a commented settings file. With FILE or options of mlx_lm: for that run; else one to complete."""
        from mlx_supervisor.cli.request.init import write_settings

        sys.exit(write_settings(request, output))

    @app.command("serve", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
    def serve(context: typer.Context) -> None:
        """Run the daemon in the foreground."""
        from mlx_supervisor.cli.serve import serve as serve_daemon

        sys.exit(serve_daemon(context.args))

    add_commands(app)
    app(prog_name="mlx-supervisor")


def _run(request: "RunRequest", *, as_json: bool, fresh: bool, bare: bool, dry_run: bool) -> int:
    """The exit status of `run`. Wrong settings are refused before the imports that take most of a second."""
    from mlx_supervisor.settings.schema import SettingsError

    if dry_run:
        from mlx_supervisor.cli.check.command import check

        return check(request, measures=False, as_json=as_json)
    try:
        request.read()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG_SETTINGS
    if bare:
        from mlx_supervisor.cli.bare import run_bare

        return run_bare(request, fresh=fresh)
    from mlx_supervisor.cli.run import run

    return run(request, as_json=as_json, fresh=fresh)
