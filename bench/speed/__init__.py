"""Time and memory, phase by phase: suites, runs, receipts."""
