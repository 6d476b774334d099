"""The nanobenchmarks of Adams and Agesen (2006), as guests, side by side on every machine that can run them."""
