"""From a prompt to the contexts that the transformer attends to."""
