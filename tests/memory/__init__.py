"""The memory plan, streaming, bounded work."""
