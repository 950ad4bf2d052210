"""The datastore and what lies beside it on disk, how it is opened, and how it is fetched from elsewhere.

Files and arrays: no language model and no index library.
"""
