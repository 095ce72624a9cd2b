"""Layouts of adapter files: one file each, and what they share."""
