"""The one writer of what tasks exist and which version answers each. Imports no torch."""
