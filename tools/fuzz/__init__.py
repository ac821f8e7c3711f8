"""Random models, configs, files, and changes to a model after it was transformed."""
