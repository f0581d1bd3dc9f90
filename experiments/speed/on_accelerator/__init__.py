"""Check and time on a real accelerator what was only compiled, one file a section.

`parity.py` (the stages against the CPU), `beside_pytorch.py`, `memory.py` and `many_clients.py`
each have a function `rows`, which the command calls. It starts processes of its own, one after the
other, so that each has the whole device and none can take the others down. `children.py` starts
them, `report.py` writes what they find.
"""
