"""Between sound and audio latents."""
