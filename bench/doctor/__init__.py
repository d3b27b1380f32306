"""Whether every kernel that the runtime uses computes right on this machine."""
