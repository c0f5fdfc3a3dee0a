"""What happens inside a module during one step: observed without changing it."""
