"""How codes are chosen: each for itself; in turn, with the errors of those before in view; so, with inputs rotated."""

SEARCH, GPTQ, GPTQ_HADAMARD = METHODS = ("search", "gptq", "gptq-hadamard")
