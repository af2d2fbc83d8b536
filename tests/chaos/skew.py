"""Sets a Python process's clock wrong, by so many seconds as a variable says; it runs as `sitecustomize`."""

from __future__ import annotations

import os
import time

VARIABLE = "CHAOS_SKEW"

if VARIABLE in os.environ:
    skew_ns, true_ns = round(float(os.environ[VARIABLE]) * 1e9), time.time_ns
    time.time_ns = lambda: true_ns() + skew_ns
    time.time = lambda: time.time_ns() / 1e9
