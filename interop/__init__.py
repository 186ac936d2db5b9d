"""Does a checkpoint with tuned routers route the same in other engines? `python -m interop`, or `make interop`.

Modules named *_engine run in environments of their own, so this package and `interop.observed` need numpy at most.
"""
