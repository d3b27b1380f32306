"""How codes are chosen: each by itself; column by column, making up for earlier errors; the same with rotated
inputs."""

SEARCH, GPTQ, GPTQ_HADAMARD = METHODS = ("search", "gptq", "gptq-hadamard")
