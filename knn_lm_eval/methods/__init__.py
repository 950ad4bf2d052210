"""The papers' mathematics: the kNN-LM mixture, weights that differ from token to token, RetoMaton's automaton.

Arrays in, arrays out: no model, no disk, no index library.
"""
