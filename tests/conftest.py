"""Set before torch is imported: tiny models gain nothing from threads, and lose much where another process has the core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
