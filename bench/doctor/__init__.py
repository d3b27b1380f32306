"""Checks that every kernel of the runtime computes right on this machine."""
