"""The reading of a recipe, and its refusal where it cannot work."""
