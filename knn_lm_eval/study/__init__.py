"""Studies of many settings from one pass: tuning, curves, sizes, indexes, speed, and what was found for a token.

They compute and return; verbs parse and print, ``report`` draws.
"""
