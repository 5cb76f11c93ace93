"""A settings file with a mistake is refused before anything starts, and the message names the key."""

import os
import re
from pathlib import Path

import msgspec
import pytest

from mlx_supervisor.core.actions import Spawn
from mlx_supervisor.core.history import DEFAULT_MTBF_S
from mlx_supervisor.core.policy import MIB
from mlx_supervisor.settings import reader as module
from mlx_supervisor.settings.default_state_dir import default_state_dir
from mlx_supervisor.settings.paths import DEFAULT_FILE
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.settings.schema import RunSettings, Settings, SettingsError, TaskSettings
from mlx_supervisor.settings.sizes import bytes_of, parse_bytes, parse_limit
from mlx_supervisor.settings.to_job import job_of
from mlx_supervisor.settings.to_policy import limit_bytes, policy_of
from mlx_supervisor.settings.validation import PROBLEMS_SHOWN, leaves
from mlx_supervisor.wire import dump_json, load_job

GIB = 1024**3

TASK = '[runs.night.task]\nkind = "python"\nentry = "pkg.mod:build"\n'
GOOD = "[runs.night]\nsteps = 100\n" + TASK


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "runs.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder: Path, text: str | bytes) -> Settings:
    return read_settings(write(folder, text), folder / "state")


def refused(folder: Path, text: str | bytes) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        read(folder, text)
    assert str(folder / "runs.toml") in str(caught.value)
    return caught.value.problems


def with_table(table: str, lines: str) -> str:
    return f"{GOOD}[runs.night.{table}]\n{lines}\n"


def with_run(lines: str) -> str:
    return f"[runs.night]\nsteps = 100\n{lines}\n{TASK}"


def with_task(lines: str) -> str:
    return f"[runs.night]\nsteps = 100\n[runs.night.task]\n{lines}\n"


# (text of the file, the key's path, words of what was found, words of what is allowed)
WRONG = [
    # the file as a whole
    ("", "runs", "no run", "[runs.NAME]"),
    ("[runs]\n", "runs", "no run", "[runs.NAME]"),
    ("runs = 3\n", "runs", "whole number 3", "[runs.NAME]"),
    ("runs = []\n", "runs", "an array", "[runs.NAME]"),
    ("[runs]\nnight = 3\n", "runs.night", "whole number 3", "a table"),
    ("[runs.night]\nsteps = 3\n", "runs.night.task", "nothing", "a table"),
    (GOOD + "[night2]\nsteps = 3\n", "night2", "unknown key", "did you mean [runs.night2]?"),
    ("stat_dir = 'x'\n" + GOOD, "stat_dir", "unknown key", "runs, state_dir"),
    ("state_dir = 3\n" + GOOD, "state_dir", "whole number 3", "a folder"),
    ("state_dir = ''\n" + GOOD, "state_dir", '""', "a folder"),
    ('state_dir = "a\\u0000b"\n' + GOOD, "state_dir", "u0000", "a folder"),
    # names
    (GOOD.replace("night", '"two words"'), 'runs."two words"', "two words", "A-Z a-z 0-9"),
    (GOOD.replace("night", '""'), 'runs.""', '""', "1 to 64"),
    (GOOD.replace("night", '"../up"'), 'runs."../up"', "../up", "first a letter or digit"),
    (GOOD.replace("night", '"a\\n"'), 'runs."a\\n"', "a\\n", "A-Z a-z 0-9"),
    (GOOD.replace("night", "n" * 65), f"runs.{'n' * 65}", "nnnn", "1 to 64"),
    (GOOD.replace("night", "ALL"), "runs.ALL", '"ALL"', "any other name"),
    (GOOD + GOOD.replace("night", "Night"), "runs.Night", "differs from night only by case", "another name"),
    # unknown keys, with the nearest
    (with_run("stepz = 3"), "runs.night.stepz", "unknown key", "did you mean runs.night.steps?"),
    (with_run("batch_size = 3"), "runs.night.batch_size", "unknown key", "did you mean runs.night.batch.size?"),
    (with_table("batch", "sise = 3"), "runs.night.batch.sise", "unknown key", "did you mean runs.night.batch.size?"),
    (with_table("memory", "limits = 3"), "runs.night.memory.limits", "unknown key", "runs.night.memory.limit?"),
    (with_table("drill", "xyzzy = 3"), "runs.night.drill.xyzzy", "unknown key", "leak_mib_per_step"),
    # types and ranges
    (with_run("seed = -1"), "runs.night.seed", "whole number -1", "a whole number from 0"),
    (with_run("seed = true"), "runs.night.seed", "boolean true", "a whole number"),
    (with_run('seed = "7"'), "runs.night.seed", '"7"', "a whole number"),
    (with_run("seed = 7.0"), "runs.night.seed", "number 7.0", "a whole number"),
    (with_run("autostart = 1"), "runs.night.autostart", "whole number 1", "true or false"),
    (GOOD.replace("100", "0"), "runs.night.steps", "whole number 0", "from 1"),
    (GOOD.replace("100", "2147483648"), "runs.night.steps", "2147483648", "to 2147483647"),
    (GOOD.replace("100", "9" * 400), "runs.night.steps", "bits", "a whole number"),
    (GOOD.replace("100", "2026-01-01"), "runs.night.steps", "2026-01-01", "a whole number"),
    (with_run("batch = 8"), "runs.night.batch", "whole number 8", "a table"),
    (with_table("batch", "size = true"), "runs.night.batch.size", "boolean true", "a whole number from 1"),
    (with_table("batch", "size = 0"), "runs.night.batch.size", "whole number 0", "from 1"),
    (with_table("batch", "grow_after_steps = nan"), "runs.night.batch.grow_after_steps", "nan", "a whole number"),
    (with_table("memory", "soft_share = nan"), "runs.night.memory.soft_share", "nan", "above 0 to 1"),
    (with_table("memory", "soft_share = 0.0"), "runs.night.memory.soft_share", "0.0", "above 0 to 1"),
    (with_table("memory", "leak_mib_per_step = inf"), "runs.night.memory.leak_mib_per_step", "inf", "above 0"),
    (with_table("memory", "sample_interval_s = 0.001"), "runs.night.memory.sample_interval_s", "0.001", "0.005 to 10"),
    (with_table("checkpoint", "keep = 0"), "runs.night.checkpoint.keep", "whole number 0", "from 1 to 1000"),
    (with_table("checkpoint", "overhead = 0"), "runs.night.checkpoint.overhead", "0", "above 0 to 0.5"),
    (with_table("checkpoint", "overhead = 0.6"), "runs.night.checkpoint.overhead", "0.6", "above 0 to 0.5"),
    (with_table("checkpoint", 'overhead = "1%"'), "runs.night.checkpoint.overhead", '"1%"', "a number"),
    (with_table("checkpoint", "overhead = nan"), "runs.night.checkpoint.overhead", "nan", "a finite number"),
    (with_table("checkpoint", "every_steps = -1"), "runs.night.checkpoint.every_steps", "-1", "a whole number"),
    (with_table("checkpoint", "every_steps = 1.5"), "runs.night.checkpoint.every_steps", "1.5", "a whole number"),
    (with_table("checkpoint", "every_seconds = -1.0"), "runs.night.checkpoint.every_seconds", "-1.0", "from 0"),
    (with_table("checkpoint", "every_seconds = inf"), "runs.night.checkpoint.every_seconds", "inf", "finite"),
    (with_table("checkpoint", "keep_best = 1"), "runs.night.checkpoint.keep_best", "whole number 1", "true or false"),
    (with_table("checkpoint", "keep_bets = true"), "runs.night.checkpoint.keep_bets", "unknown key", "keep_best"),
    (with_table("restart", "start_timeout_s = inf"), "runs.night.restart.start_timeout_s", "inf", "a finite number"),
    (with_table("restart", "backoff_s = -1.0"), "runs.night.restart.backoff_s", "-1.0", "from 0"),
    (with_table("drill", 'leak_kind = "both"'), "runs.night.drill.leak_kind", '"both"', '"arrays" or "native"'),
    (with_table("drill", "generations = [1, 0]"), "runs.night.drill.generations[1]", "whole number 0", "from 1"),
    (with_table("drill", "generations = 1"), "runs.night.drill.generations", "whole number 1", "an array"),
    # sizes
    (with_table("memory", "limit = true"), "runs.night.memory.limit", "boolean true", "a whole number"),
    (with_table("memory", "limit = nan"), "runs.night.memory.limit", "nan", "above 0 up to 1.0"),
    (with_table("memory", "cache_limit = inf"), "runs.night.memory.cache_limit", "inf", "bytes (a whole number)"),
    (with_table("memory", 'limit = "lots"'), "runs.night.memory.limit", '"lots"', "units are B, KB"),
    (with_table("memory", 'limit = "18 GiBB"'), "runs.night.memory.limit", "18 GiBB", "units are"),
    (with_table("memory", 'limit = "-2 GB"'), "runs.night.memory.limit", "-2 GB", "units are"),
    (with_table("memory", 'limit = "120%"'), "runs.night.memory.limit", "120%", "a share"),
    (with_table("memory", "limit = 0.0"), "runs.night.memory.limit", "0.0", "a share"),
    (with_table("memory", "limit = 80.0"), "runs.night.memory.limit", "80.0", "a share"),
    (with_table("memory", "limit = 1"), "runs.night.memory.limit", "whole number 1", "at least 64 MiB"),
    (with_table("memory", 'limit = "63 MiB"'), "runs.night.memory.limit", "63 MiB", "at least 64 MiB"),
    (with_table("memory", 'device_limit = "0%"'), "runs.night.memory.device_limit", "0%", "a share"),
    (with_table("memory", "device_limit = 1"), "runs.night.memory.device_limit", "whole number 1", "at least 64 MiB"),
    (with_table("memory", 'policy = "sometimes"'), "runs.night.memory.policy", "sometimes", '"adaptive" or "always"'),
    (
        with_table("memory", "clear_after_gradients = true"),
        "runs.night.memory.clear_after_gradients",
        "true",
        'memory.policy = "always"',
    ),
    (with_table("memory", 'cache_limit = "10%"'), "runs.night.memory.cache_limit", "10%", "a size such as"),
    (with_table("memory", "cache_limit = -1"), "runs.night.memory.cache_limit", "-1", "bytes"),
    # contradictions
    (with_table("batch", "size = 2\nminimum = 4"), "runs.night.batch.minimum", "4", "at most batch.size, 2"),
    (with_table("batch", "size = 2\nstart = 4"), "runs.night.batch.start", "4", "at most batch.size, 2"),
    (
        with_table("batch", "size = 8\nminimum = 4\nstart = 2"),
        "runs.night.batch.start",
        "2",
        "at least batch.minimum, 4",
    ),
    (with_table("batch", "start = 2"), "runs.night.batch.start", "2", "no value, because batch.size is not set"),
    (with_table("batch", "accumulation = 2"), "runs.night.batch.accumulation", "2", "batch.size is not set"),
    (with_table("batch", "size = 65536\naccumulation = 65536"), "runs.night.batch.accumulation", "65536", "below"),
    (with_table("checkpoint", "every_seconds = 0"), "runs.night.checkpoint", "no interval above 0", "be resumed"),
    (with_table("checkpoint", "every_steps = 0"), "runs.night.checkpoint", "no interval above 0", "overhead decides"),
    (
        with_table("checkpoint", "every_steps = 0\nevery_seconds = 0.0\noverhead = 0.02"),
        "runs.night.checkpoint",
        "no interval above 0",
        "every_steps or every_seconds above 0",
    ),
    (
        with_table("restart", "backoff_s = 9\nbackoff_max_s = 3"),
        "runs.night.restart.backoff_s",
        "9",
        "at most restart.backoff_max_s, 3",
    ),
    (with_table("drill", "allocate_at_step = 3"), "runs.night.drill.allocate_mib", "0", "above 0"),
    (with_table("drill", "allocate_mib = 3"), "runs.night.drill.allocate_at_step", "nothing", "a step"),
    (with_table("drill", "leak_from_step = 3"), "runs.night.drill.leak_mib_per_step", "0", "above 0"),
    (with_table("drill", "crash_at_step = 101"), "runs.night.drill.crash_at_step", "101", "at most steps, 100"),
    (with_table("drill", "hang_at_step = 101"), "runs.night.drill.hang_at_step", "101", "at most steps, 100"),
    # the task
    (with_task('kind = "jax"'), "runs.night.task.kind", '"jax"', '"mlx_lm" or "python"'),
    (with_task('entry = "a:b"'), "runs.night.task.kind", "nothing", '"mlx_lm" or "python"'),
    (with_task('kind = "python"'), "runs.night.task.entry", "nothing", "package.module:function"),
    (with_task('kind = "python"\nentry = "a.b"'), "runs.night.task.entry", '"a.b"', "package.module:function"),
    (with_task('kind = "python"\nentry = "a b:c"'), "runs.night.task.entry", '"a b:c"', "package.module:function"),
    (with_task('kind = "python"\nentry = "a:b"\nconfig = "c"'), "runs.night.task.config", "python", '"mlx_lm"'),
    (TASK + "mlx_lm_compatible = true\n", "runs.night.task.mlx_lm_compatible", "python", '"mlx_lm"'),
    (TASK, "runs.night.steps", "nothing", 'for kind "python"'),
    (with_task('kind = "mlx_lm"'), "runs.night.task.config", "nothing", "an mlx_lm configuration file"),
    (with_task('kind = "mlx_lm"\nconfig = "no.yaml"'), "runs.night.task.config", "no file at", "configuration file"),
    (with_task('kind = "mlx_lm"\nconfig = "."'), "runs.night.task.config", "no file at", "configuration file"),
    (with_task('kind = "mlx_lm"\nconfig = "runs.toml"\nentry = "a:b"'), "runs.night.task.entry", "mlx_lm", "python"),
    (with_task('kind = "mlx_lm"\nconfig = "runs.toml"\nargs = {a = 1}'), "runs.night.task.args", "mlx_lm", "python"),
    (GOOD + "args = 3", "runs.night.task.args", "whole number 3", "a table"),
    (GOOD + "args = {a = nan}", "runs.night.task.args.a", "nan", "a finite number"),
    (GOOD + "args = {a = [1, 2026-01-01]}", "runs.night.task.args.a[1]", "2026-01-01", "a string"),
    (GOOD + "args = {a = 9223372036854775808}", "runs.night.task.args.a", "9223372036854775808", "64 bits"),
    (
        GOOD + "args = {a = " + "[" * 40 + "]" * 40 + "}",
        f"runs.night.task.args.a{'[0]' * 32}",
        "deeper nesting",
        "32 levels",
    ),
    (GOOD + f'args = {{a = "{"x" * 300_000}"}}', "runs.night.task.args", "bytes as JSON", "at most 262,144 bytes"),
]


@pytest.mark.parametrize(("text", "path", "found", "allowed"), WRONG, ids=[f"{i}-{w[1]}" for i, w in enumerate(WRONG)])
def test_wrong_file_is_refused_with_key_found_and_allowed(
    tmp_path: Path, text: str, path: str, found: str, allowed: str
) -> None:
    (problem,) = [one for one in refused(tmp_path, text) if one.startswith(path)]
    assert found in problem
    assert allowed in problem
    assert problem.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe", "line 1: byte 0xff is not UTF-8"),
        (b"[runs.a]\nx = '\xe9'\n", "line 2: byte 0xe9"),
        ("[runs.a\n", "line 1"),
        ("[runs.a]\nsteps = 1\nsteps = 2\n", "line 3"),
        ("x = " + "[" * 5000, "invalid TOML"),
        ("x = " + "1" * 5000, "invalid TOML"),
        ("#" * (1024 * 1024 + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_what_is_not_toml_is_refused_with_its_line(tmp_path: Path, text: str | bytes, words: str) -> None:
    (problem,) = refused(tmp_path, text)
    assert words in problem


def test_missing_file_folder_and_fifo_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, words in (("none.toml", "no such file"), (".", "a folder"), ("fifo", "not a regular file")):
        with pytest.raises(SettingsError, match=words):
            read_settings(tmp_path / name, tmp_path)
    (tmp_path / "locked").write_text(GOOD)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(tmp_path / "locked" / "below", tmp_path)


def test_all_problems_are_reported_at_once_and_bounded(tmp_path: Path) -> None:
    text = "[runs.a]\nsteps = 0\nx = 1\n[runs.b]\nseed = -1\n[runs.c.task]\nkind = 3\n"
    starts = ["runs.a.x", "runs.a.steps", "runs.a.task", "runs.b.seed", "runs.b.task", "runs.c.task.kind"]
    problems = refused(tmp_path, text)
    assert sorted(problem.split(":")[0] for problem in problems) == sorted(starts)
    many = refused(tmp_path, GOOD + "".join(f"z{i} = 1\n" for i in range(200)))
    assert len(many) == PROBLEMS_SHOWN + 1
    assert many[-1] == "and 150 more"
    assert len(refused(tmp_path, "[runs.night]\n" + "x" * 500_000 + " = 1\n" + TASK)[0]) < 2000


def test_too_many_runs_are_refused(tmp_path: Path) -> None:
    assert len(read(tmp_path, "".join(GOOD.replace("night", f"n{i}") for i in range(64))).runs) == 64
    (problem,) = refused(tmp_path, "".join(GOOD.replace("night", f"n{i}") for i in range(65)))
    assert problem == "runs: found 65 runs; allowed: at most 64"


def test_a_short_file_has_the_defaults_and_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    for text in (GOOD, b"\xef\xbb\xbf" + GOOD.encode()):
        settings = read(tmp_path, text)
        run = settings.runs["night"]
        assert settings.path == tmp_path / "runs.toml"
        assert (run.steps, run.seed, run.memory.limit, run.checkpoint.automatic) == (100, None, 0.8, True)


def test_whole_numbers_do_for_seconds_and_the_config_is_found_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "lora.yaml").write_text("")
    text = '[runs.n.task]\nkind = "mlx_lm"\nconfig = "lora.yaml"\n[runs.n.restart]\nbackoff_s = 2\n'
    settings = read(tmp_path, text)
    assert settings.runs["n"].restart.backoff_s == 2.0
    job = job_of(settings, "n", tmp_path / "run", None, Spawn(1, None, None), None)
    assert job.task.config == str(tmp_path / "lora.yaml")
    assert job.steps is None


def test_state_dir_argument_before_file_before_environment_before_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv(module.STATE_DIR_VARIABLE, raising=False)
    plain = write(tmp_path, GOOD)
    assert read_settings(plain).state_dir.is_relative_to(tmp_path / "home")
    assert "mlx-supervisor" in str(read_settings(plain).state_dir)
    monkeypatch.setenv(module.STATE_DIR_VARIABLE, str(tmp_path / "env"))
    assert read_settings(plain).state_dir == tmp_path / "env"
    assert read_settings(write(tmp_path, "state_dir = 'here'\n" + GOOD)).state_dir == tmp_path / "here"
    assert read_settings(write(tmp_path, "state_dir = '~/s'\n" + GOOD)).state_dir == tmp_path / "home" / "s"
    assert read_settings(plain, tmp_path / "arg").state_dir == tmp_path / "arg"


def test_each_settings_file_has_a_state_folder_of_its_own_that_fits_its_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my project!").mkdir()
    file = tmp_path / "my project!/lora.yaml"
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    for user in ("jo", "firstname.lastname"):
        base = Path(f"/Users/{user}/Library/Application Support/mlx-supervisor")
        monkeypatch.setattr("platformdirs.user_state_path", lambda _, base=base: base)
        found = [
            default_state_dir(path) for path in (file, tmp_path / "my project!/other.yaml", tmp_path / "lora.yaml")
        ]
        assert len(set(found)) == 3
        assert default_state_dir(link) == found[0]
        for folder in found:
            assert folder.parent == base / "projects"
            assert len(str(folder / "telemetry.sock")) <= 100
            assert re.fullmatch(r"([A-Za-z0-9._-]+-)?[0-9a-f]{6}", folder.name)
        assert default_state_dir(DEFAULT_FILE) == base
        if user == "jo":
            assert found[0].name.startswith("my-project-")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (GIB, GIB),
        ("18 GiB", 18 * GIB),
        ("12G", 12 * GIB),
        ("900m", 900 * 2**20),
        ("2200 MiB", 2200 * MIB),
        ("2200MiB", 2200 * MIB),
        ("2 GB", 2_000_000_000),
        ("1.5 gib", 3 * GIB // 2),
        ("99999999 B", 99_999_999),
    ],
)
def test_an_amount_is_read_as_bytes(value: int | str, expected: int) -> None:
    for parse in (parse_bytes, parse_limit):
        assert parse(value) == expected
        assert isinstance(parse(value), int)
    assert bytes_of(expected, 100_000) == expected


@pytest.mark.parametrize(("value", "share", "expected"), [
    ("80%", 0.8, 80_000), ("12.5 %", 0.125, 12_500), (0.25, 0.25, 25_000), (1.0, 1.0, 100_000), ("100%", 1.0, 100_000),
])  # fmt: skip
def test_a_share_is_read_as_a_number(value: float | str, share: float, expected: int) -> None:
    assert parse_limit(value) == share
    assert isinstance(parse_limit(value), float)
    assert bytes_of(share, 100_000) == expected
    with pytest.raises(ValueError, match="a size such as"):
        parse_bytes(value)


def test_limit_must_fit_the_machine(tmp_path: Path) -> None:
    run = read(tmp_path, with_table("memory", 'limit = "18 GiB"')).runs["night"]
    assert limit_bytes(run, 32 * GIB) == 18 * GIB
    with pytest.raises(SettingsError) as caught:
        limit_bytes(run, 16 * GIB, "runs.night")
    assert str(caught.value).startswith(
        "runs.night.memory.limit: found 18,432.0 MiB (19,327,352,832 bytes); allowed: at most"
    )
    share = read(tmp_path, with_table("memory", "limit = 0.5")).runs["night"]
    assert limit_bytes(share, 4 * GIB) == 2 * GIB
    with pytest.raises(SettingsError, match="at least 64 MiB"):
        limit_bytes(share, 100 * MIB)


def test_every_threshold_reaches_the_policy(tmp_path: Path) -> None:
    text = GOOD + (
        "[runs.night.batch]\nsize = 8\naccumulation = 2\npreserve_effective = false\nminimum = 2\nstart = 4\n"
        "grow_after_steps = 11\n[runs.night.memory]\nlimit = '1 GiB'\nconfirm_samples = 5\nsoft_share = 0.5\n"
        "leak_mib_per_step = 2.0\nrelief_wait_s = 1.5\n[runs.night.restart]\nmax_without_progress = 7\nbackoff_s = 3\n"
        "backoff_max_s = 9\nstart_timeout_s = 77\nstop_grace_s = 5\nterm_grace_s = 6\nhang_timeout_s = 8\n"
        "close_after_steps = 13\n"
    )
    policy = policy_of(read(tmp_path, text).runs["night"], 8 * GIB)
    assert (policy.batch.size, policy.batch.accumulation, policy.batch.preserve_effective) == (8, 2, False)
    assert (policy.batch.minimum, policy.batch.start, policy.batch.grow_after_steps) == (2, 4, 11)
    assert (policy.memory.limit_bytes, policy.memory.confirm_samples, policy.memory.soft_share) == (GIB, 5, 0.5)
    assert (policy.memory.min_slope_bytes, policy.memory.relief_wait_s) == (2 * MIB, 1.5)
    assert (policy.restart.max_without_progress, policy.restart.close_after_steps) == (7, 13)
    assert (policy.restart.backoff_s, policy.restart.backoff_max_s, policy.restart.start_timeout_s) == (3, 9, 77)
    assert (policy.restart.stop_grace_s, policy.restart.term_grace_s, policy.restart.hang_timeout_s) == (5, 6, 8)


def test_job_survives_its_file_and_carries_everything(tmp_path: Path) -> None:
    text = GOOD + (
        'args = {width = 32, deep = {a = [1, "x"]}}\n[runs.night.memory]\ncache_limit = "1 GiB"\n'
        'release_pause_s = 0.5\npolicy = "always"\ndevice_limit = "2 GiB"\n'
        "clear_before_gradients = true\nclear_after_gradients = true\nclear_after_update = false\n"
        "[runs.night.checkpoint]\nevery_steps = 9\nevery_seconds = 5\nkeep = 2\n[runs.night.batch]\nsample_log = true\n"
        "[runs.night.drill]\nleak_mib_per_step = 4\ngenerations = [1, 2]\n"
    )
    settings = read(tmp_path, text)
    job = job_of(settings, "night", tmp_path / "run", "ipc://x", Spawn(3, 4, 16, 5), 3 * GIB)
    assert load_job(dump_json(job)) == job
    assert (job.run, job.generation, job.telemetry, job.steps) == ("night", 3, "ipc://x", 100)
    assert (job.batch.size, job.batch.effective, job.batch.sample_log) == (4, 16, True)
    assert (job.memory.cache_limit_bytes, job.memory.release_pause_s) == (GIB, 0.5)
    assert (job.memory.policy, job.memory.limit_bytes, job.memory.device_limit_bytes) == ("always", 3 * GIB, 2 * GIB)
    assert job.memory.clear_before_gradients
    assert job.memory.clear_after_gradients
    assert not job.memory.clear_after_update
    assert (job.checkpoint.every_steps, job.checkpoint.every_seconds, job.checkpoint.keep) == (9, 5.0, 2)
    assert job.checkpoint.tighter_steps == 5
    assert (job.drill.leak_mib_per_step, job.drill.generations) == (4.0, [1, 2])
    assert job.task.args == {"width": 32, "deep": {"a": [1, "x"]}}
    assert job.task.base_dir == str(tmp_path)


def test_a_named_interval_switches_the_automatic_one_off(tmp_path: Path) -> None:
    for lines, expected in {
        "keep = 2": (0, 0.0, 0.01),
        "overhead = 0.05": (0, 0.0, 0.05),
        "every_steps = 9": (9, 0.0, 0.0),
        "every_seconds = 30\noverhead = 0.05": (0, 30.0, 0.0),
        "every_seconds = 30\nevery_steps = 0": (0, 30.0, 0.0),
    }.items():
        settings = read(tmp_path, with_table("checkpoint", lines))
        job = job_of(settings, "night", tmp_path, None, Spawn(1, 1, 1, None, 77.0), None).checkpoint
        assert (job.every_steps, job.every_seconds, job.overhead) == expected
        assert job.mean_time_between_failures_s == 77.0


def test_a_generation_that_saved_nothing_tightens_the_automatic_interval_too(tmp_path: Path) -> None:
    settings = read(tmp_path, with_table("checkpoint", "keep_best = true"))
    job = job_of(settings, "night", tmp_path, None, Spawn(2, 1, 1, 4), None).checkpoint
    assert (job.every_steps, job.tighter_steps, job.overhead, job.keep_best) == (0, 4, 0.01, True)
    assert job.mean_time_between_failures_s == DEFAULT_MTBF_S


def test_checkpoint_interval_is_tightened_beside_the_requested_one(tmp_path: Path) -> None:
    for every, tighter, expected in ((9, 5, 5), (9, 50, 50), (0, 5, 5), (9, None, 0)):
        settings = read(tmp_path, with_table("checkpoint", f"every_steps = {every}\nevery_seconds = 60"))
        job = job_of(settings, "night", tmp_path, None, Spawn(1, 1, 1, tighter), None).checkpoint
        assert (job.every_steps, job.tighter_steps) == (every, expected)


@pytest.mark.parametrize(("value", "expected"), [('"40 %"', 0.4), ("0.25", 0.25), ('"100%"', 1.0)])
def test_a_share_of_the_device_is_left_to_the_worker(tmp_path: Path, value: str, expected: float) -> None:
    settings = read(tmp_path, with_table("memory", f"device_limit = {value}"))
    memory = job_of(settings, "night", tmp_path, None, Spawn(1, 1, 1), None).memory
    assert (memory.device_limit_share, memory.device_limit_bytes) == (expected, None)
    plain = job_of(read(tmp_path, GOOD), "night", tmp_path, None, Spawn(1, 1, 1), None).memory
    assert (plain.policy, plain.device_limit_share, plain.device_limit_bytes) == ("adaptive", 0.8, None)


def test_docs_name_every_key_with_its_default_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    documented = {
        cells[1].strip().strip("`"): cells[2].strip()
        for line in text.splitlines()
        if (cells := line.split("|"))[0] == "" and len(cells) >= 5 and cells[1].strip().startswith("`")
    }
    assert set(documented) == {"state_dir", *leaves(RunSettings)}
    defaults = msgspec.to_builtins(RunSettings(task=TaskSettings(kind="python")))
    for key in leaves(RunSettings):
        value = defaults
        for step in key.split("."):
            value = value[step]
        if key == "task.kind":
            assert documented[key] == "required"
        elif value is None or value in ({}, []):
            assert documented[key] in ("none", "`{}`", "`[]`"), key
        else:
            shown = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else value
            assert documented[key] == f"`{shown}`", key
