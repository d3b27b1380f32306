"""Packing, calibrating, choosing bits."""
