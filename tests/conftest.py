"""Set before torch is imported: tiny models gain nothing from threads, and lose much where others have the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
