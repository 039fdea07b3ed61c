"""The command line: parse, call, print. Nothing else in the package imports it."""

from .app import app, main, program

__all__ = ["app", "main", "program"]
