"""Alarms during a run: a listener that looks at every line of metrics."""
