"""Expert reuse: router tuning, routing traces, cache simulation. Stands on runtime alone."""
