"""Which layers get which bits, as data."""
