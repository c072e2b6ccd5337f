"""The reference model, whose log-probabilities are computed once and cached.

reference.py   Reference: its four forms
choice.py      which form a run uses, and which forms it refuses
keys.py        what a value in the cache depends on; filling the cache
cache.py       the cache's file (SQLite)
run_cache.py   the cache in a run, which does without the file where that fails
int8.py        a copy with 8-bit linear layers
"""
