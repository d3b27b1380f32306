"""What a generation consists of: each phase in one class, and the one list of them (order.py)."""
