"""Amounts of memory as people write them."""

import re

SMALLEST_LIMIT_BYTES = 64 * 1024 * 1024
"""Less than this not even the interpreter with MLX loaded needs."""

_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]{1,3}|%)\s*", re.ASCII)


def parse_bytes(value: int | float | str, total_bytes: int | None) -> int:
    """Bytes (int), a size ("18 GiB", "2 GB"), or a share of `total_bytes` ("80%", a float up to 1).

    `total_bytes` None: shares are not allowed. Raises ValueError, which says what is allowed.
    """
    allowed = 'bytes (a whole number) or a size such as "18 GiB"'
    if total_bytes is not None:
        allowed += ', or a share: "80%", or a number above 0 up to 1.0'
    share: float | None = None
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        unit = match.group(2).lower() if match else ""
        if match is None or (unit != "%" and unit not in _UNITS):
            raise ValueError(f"{allowed}; units are B, KB, MB, GB, TB, KiB, MiB, GiB, TiB")
        if unit != "%":
            return int(float(match.group(1)) * _UNITS[unit])
        share = float(match.group(1)) / 100
    elif isinstance(value, float):
        share = value
    else:
        if value < 0:
            raise ValueError(allowed)
        return value
    if total_bytes is None or not 0 < share <= 1:
        raise ValueError(allowed)
    return int(share * total_bytes)


def share_of(value: int | float | str) -> float | None:
    """The share that the value names ("80%", 0.8), None when it names bytes. The value has been parsed before."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        return float(value.rstrip().rstrip("%")) / 100
    return value if isinstance(value, float) else None


def check_smallest(limit: int) -> None:
    if limit < SMALLEST_LIMIT_BYTES:
        raise ValueError(f'at least 64 MiB ({SMALLEST_LIMIT_BYTES}); a share is written 1.0 or "100%"')
