"""Rival quantizers on the same weights and the same inputs, run in an environment of their own."""
