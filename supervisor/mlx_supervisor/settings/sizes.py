"""Amounts of memory in the settings file. Once read, whole numbers are bytes and floats are shares of a total."""

import re

SMALLEST_LIMIT_BYTES = 64 * 1024 * 1024
"""The interpreter with MLX loaded needs more than this."""
BYTES_ALLOWED = 'bytes (a whole number) or a size such as "18 GiB"'
LIMIT_ALLOWED = f'{BYTES_ALLOWED}, or a share: "80%", or a number above 0 up to 1.0'

_UNITS = {
    "b": 1,
    **{letter: 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]{1,3}|%)\s*", re.ASCII)


def parse_bytes(value: object) -> int:
    """Bytes (18) or a size ("18 GiB"), in bytes. Raises ValueError with what is allowed."""
    size = _parse(value, BYTES_ALLOWED)
    if isinstance(size, float):
        raise ValueError(BYTES_ALLOWED)
    return size


def parse_limit(value: object) -> int | float:
    """A limit: bytes or a size in bytes, a share ("80%", 0.8) as a float. Raises ValueError with what is allowed."""
    size = _parse(value, LIMIT_ALLOWED)
    if isinstance(size, float) and not 0 < size <= 1:
        raise ValueError(LIMIT_ALLOWED)
    if isinstance(size, int) and size < SMALLEST_LIMIT_BYTES:
        raise ValueError(f'at least 64 MiB ({SMALLEST_LIMIT_BYTES:,} bytes); a share is written 1.0 or "100%"')
    return size


def _parse(value: object, allowed: str) -> int | float:
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = match.group(2).lower() if match else ""
        if match and unit == "%":
            return float(match.group(1)) / 100
        if match and unit in _UNITS:
            return int(float(match.group(1)) * _UNITS[unit])
        raise ValueError(
            f"{allowed}; units are B, KB, MB, GB, TB (of 1,000), KiB, MiB, GiB, TiB or K, M, G, T (of 1,024)"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(allowed)
    return value


def bytes_of(size: int | float, total_bytes: int) -> int:
    """Bytes, where a float is a share of `total_bytes`."""
    return int(size * total_bytes) if isinstance(size, float) else size
