"""Benchmarks: ``python -m bench`` measures, ``python -m bench.table`` renders a results file."""
