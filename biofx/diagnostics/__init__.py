"""What one asks of a rewritten model: checks, monitors, bisection, explanations."""
