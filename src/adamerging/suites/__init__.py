"""Suites: complete recipes on real data, one command each. The recipes are the YAML files in this folder."""
