"""A published figure from one command: a recipe's steps from text to table, which resume."""
