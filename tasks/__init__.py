"""Our tasks for lm-eval: what its TaskManager reads, and the Python functions that the files name."""
