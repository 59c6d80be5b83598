"""The groups of responses that a step is trained on, drawn from an engine and scored."""
