"""Hypothesis for the whole suite: the same examples every time, however slow the machine is."""

from hypothesis import settings

settings.register_profile("dfq", derandomize=True, deadline=None)
settings.load_profile("dfq")
