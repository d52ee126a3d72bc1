"""What a process may take, and what it gives back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
import os
from edgetune.machine.memory import give_back_freed

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

# Too small for the system's own mapping each, so that the C library's heap grows.
blocks = [bytes(100_000) for _ in range(1_000)]
blocks = blocks[-1:]
kept = resident()
give_back_freed()
print(kept - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_is_given_back() -> None:
    found = subprocess.run([sys.executable, "-c", FREED], check=True, capture_output=True, text=True)
    assert int(found.stdout) > 50_000_000


LIMITED = """
import resource
from edgetune.machine.memory import free_memory_bytes
before = free_memory_bytes()
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, resource.RLIM_INFINITY))
print(before, free_memory_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_of_the_address_space_leaves_no_more_than_it_allows() -> None:
    found = subprocess.run([sys.executable, "-c", LIMITED], check=True, capture_output=True, text=True)
    before, limited = map(int, found.stdout.split())
    assert before > 1_500_000_000, "the machine has too little memory for this test"
    assert 1_000_000_000 < limited < 1_500_000_000
