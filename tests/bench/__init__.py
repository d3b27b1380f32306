"""Receipts, quality, random models."""
