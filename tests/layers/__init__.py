"""Modules that several networks are made of."""
