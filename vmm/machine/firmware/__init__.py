"""What a PC's firmware leaves in memory for an operating system to find: descriptions of the hardware, no code."""
