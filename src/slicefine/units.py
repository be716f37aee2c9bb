"""Sizes and times as a person reads them."""

from __future__ import annotations

__all__ = ["duration", "size"]

_SIZES = ("KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """Bytes as KiB, MiB, GiB or TiB with three or four figures.

    Example:
        >>> size(512), size(1_028_915), size(3 * 2**31)
        ('512 bytes', '1,005 KiB', '6.00 GiB')
    """
    if count < 2**10:
        return f"{count:.0f} bytes"
    power = 0
    while count >= 2**20 and power < len(_SIZES) - 1:
        count, power = count / 2**10, power + 1
    count /= 2**10
    return f"{count:,.{0 if count >= 100 else 1 if count >= 10 else 2}f} {_SIZES[power]}"


def duration(seconds: float) -> str:
    """Seconds as the two largest units that say something.

    Example:
        >>> duration(0.0123), duration(3.47), duration(249), duration(7_500)
        ('12 ms', '3.5 s', '4 min 9 s', '2 h 5 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, factor, rest in (("d", "h", 86_400, 3_600), ("h", "min", 3_600, 60), ("min", "s", 60, 1)):
        if whole >= factor:
            units = round(whole / rest) * rest
            return f"{units // factor} {large} {units % factor // rest} {small}"
    return f"{whole} s"
