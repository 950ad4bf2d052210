"""The command `knn-lm-eval`: a module per verb, which parses, calls the library, and prints.

What computes belongs to the rooms below, so that Python users have it too.
"""
