"""What happens to one tensor: steps, packed codes, their scales."""
