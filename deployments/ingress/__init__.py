"""HTTP and handle calls to a task's model. Imports no torch."""
