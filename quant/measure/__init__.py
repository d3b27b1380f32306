"""What calibrating measures: activation statistics, sensitivities, recorded calls."""
