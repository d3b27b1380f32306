"""Codes of one weight: forms of packing, the search for good codes, GPTQ."""
