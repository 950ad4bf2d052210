"""What the machine and the operating system give: files, checkpoints, processes, a Ray cluster, clocks and memory.

Nothing here knows of language models, datastores or indexes.
"""
