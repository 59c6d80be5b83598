"""The process a run lives in: determinism, signals, collectives, whole files, the machine's kernels."""
