"""Bits within a memory budget."""
