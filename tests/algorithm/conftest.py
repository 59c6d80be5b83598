"""No time limit per example: on a shared machine hypothesis would report a busy neighbour as a failure."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
