"""Memory of phases: planned from shapes, measured, limited. Arithmetic, counted from shapes."""
