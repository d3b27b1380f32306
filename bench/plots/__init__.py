"""Receipts as pictures."""
