"""How datastores come to be: dumping, importing, pruning, growing them, and clustering their keys.

What only reads a finished store belongs to ``store`` or ``search``.
"""
