"""The signals by which people and systems ask a process to end."""

from __future__ import annotations

import signal

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Ctrl-C, `kill`, and a closed terminal; Windows has no SIGHUP."""
