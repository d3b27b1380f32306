"""Networks against independent implementations."""
