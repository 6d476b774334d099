"""The commands. Nothing else in the package prints."""
