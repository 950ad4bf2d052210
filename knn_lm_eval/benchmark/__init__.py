"""Many evaluations from one file: the matrix of models, methods and tasks, run with shared reading."""
