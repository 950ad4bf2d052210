"""The retrieval-augmented LM: its settings, opening what they name, scoring, generation, and lm-eval's ``knn-hf``.

What evaluates many settings at once is in ``study``.
"""
