"""Measurements, each beside its ceiling: `python -m bench` runs them all, `python -m bench.NAME` one."""
