"""Sharing: one base, many tasks, each with the few layers it needs (TAPS). Loaded when asked for."""
