"""Hypothesis for the whole suite: the same examples every time, however slow the machine is. A core for each worker."""

import os

from hypothesis import settings

settings.register_profile("dfq", derandomize=True, deadline=None)
settings.load_profile("dfq")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for what tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
