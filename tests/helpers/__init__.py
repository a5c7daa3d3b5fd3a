"""Test helpers, imported by name: `from helpers.tiny_models import ...`.

Each file says what it makes. Files that tests run as programs (`*_worker.py`, `load_*.py`) are run
with `tests/` on the path.
"""
