"""What `check` found out."""

from dataclasses import dataclass, field
from pathlib import Path

from mlx_supervisor.cli.check.measuring import Measured
from mlx_supervisor.cli.check.places import Need
from mlx_supervisor.cli.check.prediction import Bound
from mlx_supervisor.wire.check import CheckReport


@dataclass
class Findings:
    """`problems`: why the run would be refused. `warnings`: what its owner should know. `report`: the worker's."""

    name: str
    path: Path
    bound: Bound
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    report: CheckReport | None = None
    disk: list[Need] = field(default_factory=list)
    measured: Measured | None = None

    @property
    def all_warnings(self) -> list[str]:
        """The worker's notes first."""
        return [*(self.report.notes if self.report else []), *self.warnings]
