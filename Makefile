# Two commands are all that anyone needs: `make demo` and `make test`. Both set up what they need.
# The others: env, soak, bench, docs, deb, zipapp, rpm, uninstall, clean.

PYTHON := .venv/bin/python
STAMP := .venv/.ready

.PHONY: demo test soak bench env lint docs deb zipapp rpm uninstall clean

demo: env
	@$(PYTHON) examples/demo.py

# Deadlines are asserted in a group of their own, which runs without other tests beside it.
test: env
	$(PYTHON) -m pytest -n 2 -m "not alone"
	$(PYTHON) -m pytest -m alone

soak: env
	$(PYTHON) -m pytest --soak -m soak

bench: env
	@$(PYTHON) bench/run.py

# The packages of the system are looked at each time (it costs a moment); the environment of
# Python is made anew when its list of libraries changes. Domains, whose user ids are not ours, run
# both, so others must be able to read them whatever umask they were made with.
env:
	@sh packaging/setup-system
	@$(MAKE) --no-print-directory -s $(STAMP)
	@$(PYTHON) -m compileall -q src
	@find src .venv ! -perm -o=r -exec chmod o+rX {} +

$(STAMP): pyproject.toml packaging/setup-python
	@sh packaging/setup-python

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# What of the documentation is made: the pages of the filters and the pictures.
docs: env
	$(PYTHON) docs/filters/build.py
	$(PYTHON) docs/pictures/draw.py

deb: env
	$(PYTHON) packaging/build-deb

zipapp: env
	$(PYTHON) packaging/build-zipapp

rpm: zipapp
	@command -v rpmbuild >/dev/null || { echo "make rpm: rpmbuild is missing (dnf install rpm-build)" >&2; exit 1; }
	rpmbuild -bb --quiet --define "_topdir $(CURDIR)/build/rpm" --define "checkout $(CURDIR)" \
	    --define "_rpmdir $(CURDIR)/dist" packaging/rpm/sluice-proxy.spec

# Undoes what set-up did: the environment, and as root the packages that it installed.
uninstall:
	@sh packaging/unset-system
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
