"""Suites of bench.py, one file each. A suite is a function that returns a `Result`; `report` writes what it measured."""
