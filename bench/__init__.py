"""Measure generation: per phase and per denoise step, with the machine's facts, as a receipt that can be compared."""
