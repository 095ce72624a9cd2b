"""Figures as the commands print them."""

from __future__ import annotations


def byte_size(count: int) -> str:
    """Bytes for humans, in units of 1024."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
