"""The metrics, displays and reports of a run."""
