"""Nearest neighbours: choosing, building, measuring and searching indexes over a datastore's keys.

The only place that imports faiss. Nothing here reads text or knows of a language model.
"""
