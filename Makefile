# Everything a newcomer needs: python3, make and a package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long bench linux real lint clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# The POPF problem on one screen.
demo: $(VENV)/installed
	@$(BIN)/python -m vmm compare guests/popf.asm

# The whole suite, within ten minutes on two cores.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# The campaigns: an hour of fuzzing among them.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m tools.fuzz --seconds 3600

# What exits and time cost, then the nanobenchmarks beside bare Unicorn and QEMU: five minutes.
bench: $(VENV)/installed
	$(BIN)/python -m tools.bench
	$(BIN)/python -m tools.bench nano

# A real Linux to boot, in linux/: Debian's kernel for i386 and busybox, fetched by apt-get and not installed.
linux: $(VENV)/installed
	$(BIN)/python -m tools.linux

# Other real guests to boot, in real/: memtest86+ and GNU Mach.
real: $(VENV)/installed
	$(BIN)/python -m tools.real_guests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info
