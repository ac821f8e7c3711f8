"""From a model to its graph: by symbolic tracing with regions where that fails, or by recording a run."""
