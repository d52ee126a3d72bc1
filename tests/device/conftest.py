"""These tests run where edgetune was installed without extras: `make test-device`. Elsewhere they are not collected."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = ["test_*.py"] if find_spec("torch") else []
