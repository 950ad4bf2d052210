"""Nearest neighbours: choosing, building, measuring and searching indexes over a datastore's keys.

No floor below imports faiss. Nothing here reads text or knows of a language model.
"""
