"""The first hour on a GPU (`make gpu`): checks and timings that fit a machine which is lent for minutes.

`__main__` is the command line. A session (`session.py`) runs a plan of stages (`plan.py`) in order of value, each in
worker processes (`worker.py`) with a hard deadline. A worker appends to its journal (`journal.py`) after every item, so
that a crash or a hang costs one item, not what was measured before. The modules `*_items.py` are the kinds of items.

The session imports only the standard library: no state of torch or of the GPU can stop it.
"""
