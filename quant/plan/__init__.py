"""The quantizing step of a conversion plan."""
