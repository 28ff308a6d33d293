"""What must be shown, and how: ``python -m benchmarks`` runs all, ``python -m benchmarks NAME`` one.

Each module here whose name does not begin with ``_`` is a benchmark. Its docstring says what it measures, and
``cases(smallest)`` yields what was measured: see ``_harness``. ``smallest`` asks for a size that shows only that the
benchmark still works.
"""
