"""The language model: loading it, finding the layer whose input is the key, reading text with it.

Nothing here knows of datastores, of searches or of lm-eval's requests.
"""
