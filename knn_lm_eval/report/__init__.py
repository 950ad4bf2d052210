"""What results look like: reading them, comparing them, tables, plots and pages.

JSON in; no model, no torch, no faiss, so that it starts at once and runs where nothing else is installed.
"""
