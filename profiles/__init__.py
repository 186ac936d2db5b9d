"""Profiling: telemetry sources, device profiles, workloads, runs and their reports. Stands on runtime alone."""
