"""The loop of VAPO and what it is made of."""
