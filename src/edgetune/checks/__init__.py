"""What verification examines, one module a check."""
