"""The phases of a generation: one class each, and the one list of them (order.py)."""
