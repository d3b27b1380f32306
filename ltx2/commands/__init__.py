"""The commands, by what they work on. They import what they need when they run, so that help is instant."""
