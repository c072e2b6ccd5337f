"""The reference model: what it says about a completion, computed once and kept.

reference.py   Reference: its four forms, and what a run asks of it
choice.py      which form a run takes, and which it refuses
keys.py        what a value in the cache depends on; filling the cache
cache.py       the cache's file (SQLite)
int8.py        a copy with 8-bit linear layers
"""
