"""The built-in base model and tone dataset, and the seeded scripts that make them."""
